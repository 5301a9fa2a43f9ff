"""The files that are hurt: each is written again and again in two forms, and read back to say whether it is one of them.

What is compared is what a user gets: of a cache, the next tokens' logits, bit by bit; of a predictor, every weight and
setting, from which all tokens follow; of rows, the rows.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import attnpred
from attnpred.evaluation.rows import RowsFile, load_rows
from attnpred.hf import TieredCache
from attnpred.hf.gguf_file import converted
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from attnpred.report.rows import read_rows
from attnpred.serving.chain import BlockStore
from tests.hf.support import SMALL
from tests.models import prompt, tiny_model

LENGTH = 90
STEPS = (prompt(1, 1, 70), prompt(1, 3, 71))
"""A sparse step, and a call that reads every block."""


class Thing(ABC):
    """name: as tables call it. folder: where its files are, and nothing else. Enter it to use it."""

    name: str
    pace = 0.06
    """Seconds in which it is written a few times."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.stack = ExitStack()

    def __enter__(self) -> "Thing":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @abstractmethod
    def steps(self) -> Iterator[None]:
        """Write for ever, over what is there or behind it; yield whenever the writer says that it is done."""

    @abstractmethod
    def wrong(self, confirmed: int = 0) -> str | None:
        """Return what is wrong with what is there after so many writes, or None. Raises if it is refused."""

    def written(self) -> int:
        """Return how many writes of earlier writers must stay beside the next ones."""
        return 0

    def is_torn(self) -> bool:
        """Return whether a file that grows ends in the middle."""
        return False

    def files(self) -> list[str]:
        """Return the names of its files."""
        return sorted(path.name for path in self.folder.iterdir())


@torch.no_grad()
def logits(cache: TieredCache) -> Tensor:
    """Return what the tiny model says after `STEPS`, [calls, V]."""
    return torch.cat([tiny_model("llama")(tokens, cache=cache, use_cache=True).logits[:, -1] for tokens in STEPS])


def read_prompt(cache: TieredCache, form: int) -> TieredCache:
    """Let the tiny model read the prompt of a form into a new cache; return it."""
    with torch.no_grad():
        tiny_model("llama")(prompt(1, LENGTH, form), cache=cache, use_cache=True)
    return cache


class SavedCache(Thing):
    """A saved cache of the policy `predicted`; the forms are two prompts. The model is attached meanwhile."""

    name = "saved cache"
    offload: str | None = None

    def __enter__(self) -> "SavedCache":
        model, config = tiny_model("llama"), SMALL
        handle = self.stack.enter_context(attnpred.attach(model, policy="predicted", config=config))
        self._caches = [read_prompt(handle.new_cache(), form) for form in range(2)]
        self._wanted = [logits(read_prompt(handle.new_cache(), form)) for form in range(2)]
        return self

    def steps(self) -> Iterator[None]:
        for number in count():
            self._caches[number % 2].save(self.folder / "a.kv", prompt(1, LENGTH, number % 2))
            yield

    def wrong(self, confirmed: int = 0) -> str | None:
        settings: dict[str, Any] = {"offload": self.offload}
        with TieredCache.load(self.folder / "a.kv", tiny_model("llama"), **settings) as cache:
            tokens, found = cache.tokens, logits(cache)
        for form, wanted in enumerate(self._wanted):
            if torch.equal(found, wanted) and tokens is not None and torch.equal(tokens, prompt(1, LENGTH, form)):
                return None
        return "it was loaded, and goes on with other tokens"


class CacheFromFile(SavedCache):
    """The same, its blocks read from the file when they are needed."""

    name = "saved cache, blocks read late"
    offload = "cpu"


class KeptBlock(Thing):
    """A block of the server's store, which is written behind answers; the forms are two contents of one name."""

    name = "block of the server"
    _key = "0" * 64

    def _block(self, form: int) -> dict[str, Tensor]:
        return {"0.keys": torch.full((2, 256, 16), float(form)), "0.values": torch.full((2, 256, 16), -float(form))}

    def steps(self) -> Iterator[None]:
        for number in count():
            (self.folder / f"{self._key}.block").unlink(missing_ok=True)  # what is there is not written again
            store = BlockStore(self.folder, 1 << 30, 0)
            store.put(self._key, self._block(number % 2))
            store.close()
            yield

    def wrong(self, confirmed: int = 0) -> str | None:
        if not (self.folder / f"{self._key}.block").exists():
            return None  # it is read again
        store = BlockStore(self.folder, 1 << 30, 0)
        found = store.take([self._key])
        store.close()
        if not found:
            return "it is there, and cannot be read"
        is_one = any(all(torch.equal(found[0][part], x) for part, x in self._block(form).items()) for form in range(2))
        return None if is_one else "it was read, and is neither"


class SavedPredictor(Thing):
    """A folder of `save_pretrained`; the forms differ in weights."""

    name = "predictor"

    def __enter__(self) -> "SavedPredictor":
        config = PredictorConfig("seer-gate", 4, heads=2, layers="0 1 2", group=2, head_dim=8, rank=8)
        self._forms = [Predictor(config), Predictor(config)]
        chance = torch.Generator().manual_seed(1)
        for form in self._forms:
            for name, weights in form.network.state_dict().items():
                if name != "vectors":  # whole numbers that fit the blocks
                    weights.copy_(torch.rand(weights.shape, generator=chance))
        return self

    def steps(self) -> Iterator[None]:
        for number in count():
            self._forms[number % 2].save_pretrained(self.folder)
            yield

    def wrong(self, confirmed: int = 0) -> str | None:
        found = Predictor.from_pretrained(self.folder)
        state = found.state_dict()
        for form in self._forms:
            if found.config == form.config and all(
                torch.equal(state[name], x) for name, x in form.state_dict().items()
            ):
                return None
        return "it was loaded, with other weights or settings"


class ConvertedModel(Thing):
    """The folder that a GGUF file is unpacked to, again and again; a model that is not there is unpacked when it is used."""

    name = "converted GGUF file"
    pace = 1.0

    def __enter__(self) -> "ConvertedModel":
        from tests.gguf_files import write_gguf  # which needs the extra `gguf`

        cache, self._file = self.folder.parent / "cache", self.folder.parent / "tiny.gguf"
        write_gguf(self._file)
        self.stack.enter_context(patch.dict(os.environ, {"XDG_CACHE_HOME": str(cache)}))
        made = converted(self._file)
        self._wanted = {path.name: path.read_bytes() for path in made.iterdir()}
        self.folder, self._made = made.parent, made
        return self

    def steps(self) -> Iterator[None]:
        for number in count():
            if self._made.exists():
                self._made.rename(self._file.with_name(f"old-{os.getpid()}-{number}"))
            converted(self._file)
            yield

    def wrong(self, confirmed: int = 0) -> str | None:
        found = {path.name: path.read_bytes() for path in self._made.iterdir()} if self._made.exists() else self._wanted
        return None if found == self._wanted else "a model is there that is not whole"


class Rows(Thing):
    """A file of rows, which one run after the other goes on with."""

    name = "rows of eval"

    def steps(self) -> Iterator[None]:
        with RowsFile(self.folder / "rows.jsonl").claimed() as file:
            for number in count(len({row["policy"] for row in file.rows})):
                file.append(rows_of_cell(number))
                yield

    def written(self) -> int:
        return len({row["policy"] for row in load_rows(self.folder / "rows.jsonl")})

    def is_torn(self) -> bool:
        path = self.folder / "rows.jsonl"
        return path.read_bytes().count(b"\n") != len(load_rows(path)) or not path.read_bytes().endswith(b"\n")

    def wrong(self, confirmed: int = 0) -> str | None:
        """What was cut off is measured again, and no fault; what a run was told is written must be there."""
        path = self.folder / "rows.jsonl"
        found = load_rows(path)
        shown = [row.raw for row in read_rows([path], say=lambda _: None)] if found else found
        cells = len({row["policy"] for row in found})
        wanted = [row for number in range(cells) for row in rows_of_cell(number)]
        if [without_places(row) for row in found] != wanted or shown[: len(found)] != found:
            return "it was read, with other rows"
        return None if cells >= confirmed else f"{confirmed} cells were written, and {cells} are there"


def rows_of_cell(number: int) -> list[dict[str, Any]]:
    """Return the rows of one cell; cells of odd numbers have two."""
    key = {"model": "m", "policy": f"p{number}", "budget": 0.1, "task": "t", "length": 9, "seed": 0, "settings": {}}
    found = {"metric": "accuracy", "value": 1 / (number + 3), "n": 3, "items": [{"name": "é", "value": 0.5}]}
    return [key | found | {"text": f"part {part}"} for part in range(1 + number % 2)]


def without_places(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what writing it adds."""
    return {name: value for name, value in row.items() if name not in ("part", "parts", "check")}


THINGS: tuple[type[Thing], ...] = (SavedCache, CacheFromFile, SavedPredictor, Rows)
