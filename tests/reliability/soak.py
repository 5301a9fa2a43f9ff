"""The soak matrix: hundreds of calls in one process, with trouble between them: tokens stay right, and nothing grows.

Every call is one of `ACTIONS` with a policy, a prompt and a slow tier, all by chance. Its tokens are compared with those of
one plain `generate` of that policy and prompt, made first. What a process holds is counted after the first half of the calls
and at the end.
"""

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnpred
from attnpred.config import CacheConfig
from attnpred.hf import Attached, TieredCache
from attnpred.policies import POLICIES
from tests.hf.support import SMALL, WHOLE, greedy, offloaded, predictor, separators
from tests.models import prompt, tiny_model
from tests.reliability.outcome import Outcome

OFFLOADS = (None, "cpu", "disk")
LENGTHS = (80, 110)
MIXED = [name for name in POLICIES if name != "pod"]  # which needs a file of layer groups
NEW = 8
"""Tokens that are generated."""
STOP = 4
"""Tokens after which something happens."""


class Trouble(Exception):
    """What a caller's own code raises in the middle of a step."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call: an attached model, the prompt [1, L], the folder for files, and what stands for chance."""

    handle: Attached
    tokens: Tensor
    folder: Path
    chance: random.Random

    def generate(self, tokens: Tensor | None = None, new: int = NEW, **more: Any) -> Tensor:
        """Return prompt and new tokens of `generate`, [1, L + new]."""
        return greedy(tiny_model("llama"), self.tokens if tokens is None else tokens, new, **more)

    def begun(self) -> tuple[TieredCache, Tensor]:
        """Return a cache after the first `STOP` tokens, and these behind the prompt."""
        cache = self.handle.new_cache()
        return cache, self.generate(new=STOP, cache=cache)

    def rest(self, cache: TieredCache, told: Tensor) -> Tensor:
        """Go on to `NEW` tokens, and close."""
        with cache:
            return self.generate(told, NEW - STOP, cache=cache)


def _plain(call: Call) -> Tensor:
    return call.generate()


def _two_turns(call: Call) -> Tensor:
    return call.rest(*call.begun())


def _saved(call: Call) -> Tensor:
    cache, told = call.begun()
    path = call.folder / "soak-saved.kv"
    cache.save(path)
    more = {"policy": cache.policy, "offload_dir": cache.settings.offload_dir}
    cache.close()
    loaded = TieredCache.load(path, tiny_model("llama"), **more)
    path.unlink()
    return call.rest(loaded, told)


def _forked(call: Call) -> Tensor:
    cache, told = call.begun()
    fork = cache.fork()
    if call.chance.random() < 0.5:
        cache, fork = fork, cache
    first, second = call.rest(fork, told), call.rest(cache, told)
    return first if torch.equal(first, second) else -second


@contextmanager
def within_a_step(after: int, do: Callable[[], None]) -> Iterator[None]:
    """Do something between the first two layers of the model, `after` so many of its calls."""
    calls = iter(range(after))
    layer = tiny_model("llama").get_submodule("model.layers.1")
    hook = layer.register_forward_pre_hook(lambda *_: do() if next(calls, None) is None else None)
    try:
        yield
    finally:
        hook.remove()


def trouble() -> None:
    """Raise."""
    raise Trouble


def _exception(call: Call) -> Tensor:
    """Raised between two layers of a step; the cache is dropped without a word, and the call made anew."""
    with within_a_step(call.chance.randrange(NEW), trouble):
        try:
            call.generate()
            return -call.tokens
        except Trouble:
            pass
    return call.generate()


def _mended(call: Call) -> Tensor:
    """The same, and the torn cache is cut back and gone on with."""
    cache, told = call.begun()
    with within_a_step(0, trouble):
        try:
            call.generate(told, 1, cache=cache)
            return -call.tokens
        except Trouble:
            cache.crop(-1)
    return call.rest(cache, told)


def _closed_within(call: Call) -> Tensor:
    """Closed in the middle of a step: one error, and the call is made anew."""
    cache = call.handle.new_cache()
    with within_a_step(call.chance.randrange(1, NEW), cache.close):
        try:
            call.generate(cache=cache)
            return -call.tokens
        except attnpred.AttnpredError:
            pass
    return call.generate()


def _cropped(call: Call) -> Tensor:
    """Tokens that should not be there are read, and cut off again."""
    cache, told = call.begun()
    other = torch.cat((told, prompt(1, call.chance.randrange(2, 9), 3)), 1)
    call.generate(other, 2, cache=cache)
    cache.crop(told.shape[1] - 1 - cache.get_seq_length())
    return call.rest(cache, told)


ACTIONS: dict[str, Callable[[Call], Tensor]] = {
    "generate": _plain,
    "two turns on one cache": _two_turns,
    "saved, closed, loaded, gone on with": _saved,
    "forked, both gone on with": _forked,
    "exception between two layers": _exception,
    "closed in the middle of a step": _closed_within,
    "exception, cut back, gone on with": _mended,
    "wrong tokens cut off again": _cropped,
}
DENSE = {"exception, cut back, gone on with", "wrong tokens cut off again"}
"""What a policy remembers of tokens that were cut off is not undone: only dense steps then give the very same tokens."""


@dataclass(slots=True)
class Held:
    """What a process holds. memory: resident bytes."""

    threads: int
    files_open: int
    files_left: int
    memory: int


def held(folder: Path) -> Held:
    """Count what this process holds now, and the files in `folder`."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    fds = len(list(Path("/proc/self/fd").iterdir()))
    return Held(threading.active_count(), fds, len(list(folder.iterdir())), pages * os.sysconf("SC_PAGE_SIZE"))


def soak(folder: Path, calls: int, seed: int = 0) -> tuple[list[Outcome], Held, Held]:
    """Make so many calls; return what became of each kind, and what was held in the middle and at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, outcomes = random.Random(seed), {name: Outcome(name) for name in ACTIONS}
    wanted: dict[Any, Tensor] = {}
    middle = None
    for number in range(calls):
        name = chance.choice(list(ACTIONS))
        is_dense = name in DENSE
        policy, length = chance.choice(MIXED), chance.choice(LENGTHS)
        config, tokens = WHOLE if is_dense else SMALL, prompt(1, length)
        key = (is_dense or policy, length)
        if key not in wanted:
            with _attached(policy, config):
                wanted[key] = greedy(tiny_model("llama"), tokens, NEW)
        with _attached(policy, offloaded(config, chance.choice(OFFLOADS), folder)) as handle:
            call = Call(handle, tokens, folder, chance)
            outcomes[name].count(f"call {number}, {policy}", partial(_check, ACTIONS[name], call, wanted[key]))
        if number == calls // 2:
            middle = held(folder)
    assert middle is not None
    return list(outcomes.values()), middle, held(folder)


def _check(action: Callable[[Call], Tensor], call: Call, wanted: Tensor) -> str | None:
    return None if torch.equal(action(call), wanted) else "other tokens"


def _attached(policy: str, config: CacheConfig) -> Attached:
    kind = POLICIES[policy].predictor_kind
    settings = replace(config, fetch_timeout=20.0)
    return attnpred.attach(
        tiny_model("llama"), policy=separators(policy), config=settings, predictor=predictor(kind) if kind else None
    )
