"""Perplexity of WikiText (arXiv 1609.07843) from its raw file: pieces in their order, each continued after its own past.

A piece is `length` tokens, read in one call, and `steps` more, of which each is fed and the next one predicted. These are
decode steps, which live on what the policy's own earlier steps have left. The value is in bits per byte, which do not
depend on the tokenizer; the row has the perplexity per token beside it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from attnpred.errors import ConfigError
from attnpred.evaluation.tasks.base import Example, Item, Measured, Question, Session, Task, Wanted, require_file
from attnpred.evaluation.tasks.haystack import encode, opening
from attnpred.evaluation.tasks.hub import is_hub_name
from attnpred.evaluation.tasks.jsonl import read_rows
from attnpred.reading import read_text


@final
@dataclass(frozen=True, slots=True)
class WikiText(Task):
    """WikiText: bits per byte of its raw file, each piece continued after its own past."""

    metric: ClassVar[str] = "bits_per_byte"
    lower_is_better: ClassVar[bool] = True
    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        begin, ids = opening(tokenizer), encode(tokenizer, _text(wanted))
        size = wanted.length - len(begin) + wanted.steps + 1  # the first token after the past is fed, and not predicted
        if wanted.length < len(begin) + 2 or wanted.steps < 1:
            raise ConfigError(
                f"got {wanted.steps} steps after {wanted.length} tokens, expected at least 1 after 3 or more"
            )
        if len(ids) < size:
            raise ConfigError(
                f"got {len(ids)} tokens in {wanted.file}, expected at least {size}: give a longer text, or a shorter length"
            )
        count = min(wanted.count, len(ids) // size)
        labels = {"steps": wanted.steps}
        return [Example(str(i), (*begin, *ids[i * size : (i + 1) * size]), (), labels=labels) for i in range(count)]

    def score(self, answer: str, question: Question) -> float:
        raise NotImplementedError("nothing is asked")

    def run(self, session: Session, example: Example) -> Iterator[Item]:
        """Feed the last tokens one by one; the item's label has the nats of all of them."""
        steps = example.labels["steps"]
        past = len(example.tokens) - steps - 1
        found = session.follow(session.read(example.tokens[:past]), example.tokens[past:-1])
        targets = torch.tensor(example.tokens[past + 1 :], dtype=torch.int64, device="cpu")
        nats = -float(found.gather(1, targets[:, None]).sum())
        size = len(session.tokenizer.decode(targets).encode())
        yield Item(example.name, nats / math.log(2) / max(1, size), {"nats": nats, "steps": steps})

    def measure(self, session: Session, examples: Sequence[Example], limit: int | None) -> list[Measured]:
        """Return one row, with the perplexity per token of all its pieces."""
        items = itertools.chain.from_iterable(self.run(session, example) for example in examples)
        kept = list(itertools.islice(items, limit))
        mean = sum(item.labels["nats"] for item in kept) / max(1, sum(item.labels["steps"] for item in kept))
        return [Measured(kept, {"perplexity": math.exp(mean)} if kept else {})]


def _text(wanted: Wanted) -> str:
    if wanted.file is not None and is_hub_name(str(wanted.file)):
        return "".join(row.text("text") for row in read_rows(wanted, "wikitext"))  # its rows keep their line ends
    return read_text(require_file(wanted, "wikitext"))
