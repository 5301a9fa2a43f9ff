"""A memory that was restored from the state of another goes on as that one does, whatever kind it is."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpred.predictor.average import Average
from attnpred.predictor.centre_keys import CentreKeys
from attnpred.predictor.clusters import Clusters
from attnpred.predictor.cnn import PaperCNN, UnpaddedCNN
from attnpred.predictor.digest import Digest
from attnpred.predictor.fitted import Fitted
from attnpred.predictor.history import History
from attnpred.predictor.incremental import IncrementalCNN
from attnpred.predictor.key_summary import KeySummary
from attnpred.predictor.memory import Columns, Memory, NoMemory, State
from attnpred.predictor.recycled import Recycling
from attnpred.predictor.seer_gate import GateKeys, GateMap
from attnpred.predictor.shared_row import SharedRow
from attnpred.predictor.turning import Turning

P, HEADS, DIM, ROWS = 4, 3, 8, 16
torch.manual_seed(0)
GATE = GateMap(torch.randn(HEADS, DIM, 4), torch.randn(HEADS, 3 * DIM, 4))
PADDED, UNPADDED = PaperCNN().eval(), UnpaddedCNN().eval()

MEMORIES: dict[str, Callable[[], Memory]] = {
    "none": NoMemory,
    "history": lambda: History(ROWS),
    "average": lambda: Average(0.8, 0.2, ROWS),
    "mean": lambda: KeySummary(P, bounds=False),
    "bounds": lambda: KeySummary(P, bounds=True),
    "digest": lambda: Digest(P),
    "recycling": lambda: Recycling(2, None),
    "recycling by likeness": lambda: Recycling(1, 0.9),
    "shared row": SharedRow,
    "centre keys": lambda: CentreKeys(P),
    "clusters": lambda: Clusters(P, 12, 3, 16),
    "turning": lambda: Turning(P),
    "gate keys": lambda: GateKeys(P, GATE),
    "fitted": lambda: Fitted(P, (1, 1), ROWS),
    "cnn": lambda: IncrementalCNN(PADDED, ROWS),
    "unpadded cnn": lambda: IncrementalCNN(UNPADDED, ROWS),
}


class Text:
    """What is shown to a memory, token by token; the same for all that begin at the same place."""

    def __init__(self, batch: int, blocks: int, seed: int) -> None:
        self.batch, self.blocks, self.random = batch, blocks, torch.Generator().manual_seed(seed)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(self.batch, *shape, generator=self.random)

    def show(self, memory: Memory) -> None:
        """Show one token, which begins a new block."""
        self.blocks += 1
        if memory.sealed >= 0:
            memory.seal(self.rand(HEADS, (self.blocks - max(memory.sealed, 0)) * P, DIM) - 0.5)
        query = self.rand(HEADS, DIM) - 0.5
        whole = memory.wants_all(query)
        memory.look(query, DIM**-0.5, HEADS)
        if memory.rows:
            known = self.rand(HEADS, 1, self.blocks) < 0.5
            known = known if whole is None else known | whole[:, None, None, None]
            memory.push(self.rand(HEADS, 1, self.blocks) * known, known)

    def step(self, memory: Memory) -> list[Tensor]:
        """Show one token, and return what the memory says then."""
        self.show(memory)
        return said(memory, self.blocks)


def said(memory: Memory, blocks: int) -> list[Tensor]:
    found = [tensor.clone() for tensor in memory.state().values() if isinstance(tensor, Tensor)]
    if isinstance(memory, IncrementalCNN):
        found.append(memory.scores(2, blocks - 1))
    if isinstance(memory, Fitted):
        found.append(memory.score(memory.weights(True), 2, blocks, blocks))
    return found


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True)
    )


def through_a_file(state: State) -> State:
    """Return what a file gives back: tensors without anything behind them, and numbers of JSON."""
    numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    tensors = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    return json.loads(json.dumps(numbers)) | tensors


def after(memory: Memory, steps: int, batch: int = 2) -> Text:
    text = Text(batch, 20, 0)
    for _ in range(steps):
        text.step(memory)
    text.show(memory)  # and is not asked
    return text


CHANGES: dict[str, Callable[[Memory, Text], Any]] = {
    "nothing": lambda memory, text: None,
    "crop": lambda memory, text: (memory.crop(14), setattr(text, "blocks", 14)),
    "select": lambda memory, text: memory.select(torch.tensor([1, 0])),
    "repeat": lambda memory, text: (memory.repeat(2), setattr(text, "batch", 4)),
    "clear": lambda memory, text: memory.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MEMORIES)
def test_a_restored_memory_goes_on(name: str, change: str) -> None:
    memory, restored = MEMORIES[name](), MEMORIES[name]()
    if change != "nothing":
        after(restored, 2, 1)  # what it knew before does not matter
    text, again = after(memory, 5), after(MEMORIES[name](), 5)
    restored.restore(through_a_file(memory.state()))
    assert restored.bytes() == memory.bytes() and restored.sealed == memory.sealed
    assert restored.is_empty == memory.is_empty
    for one, shown in ((memory, text), (restored, again)):
        CHANGES[change](one, shown)
    rebuilt = [getattr(one, "rebuilds", 0) for one in (memory, restored)]
    for _ in range(6):
        assert_same(text.step(memory), again.step(restored))
    later = [getattr(one, "rebuilds", 0) for one in (memory, restored)]
    assert later[0] - rebuilt[0] == later[1] - rebuilt[1]  # nothing is computed that need not be


@pytest.mark.parametrize("name", MEMORIES)
def test_an_empty_memory_is_restored_empty(name: str) -> None:
    memory, restored = MEMORIES[name](), MEMORIES[name]()
    after(restored, 3)
    restored.restore(through_a_file(memory.state()))
    assert restored.bytes() == 0 and restored.is_empty == memory.is_empty and restored.sealed == memory.sealed
    text, again = Text(1, 20, 3), Text(1, 20, 3)
    assert_same(text.step(memory), again.step(restored))


def test_columns_grow_alike_whatever_room_they_had() -> None:
    one, other = Columns(after=(3,), fill=-1.0), Columns(fill=-1.0)
    one.reserve(1, 2, 5, torch.device("cpu")).copy_(torch.arange(5.0)[:, None])
    one.crop(3)
    other.restore(one.state())
    assert other.after == (3,) and other.data.shape[2] == 3 < one.data.shape[2]
    for columns in (one, other):
        columns.reserve(1, 2, 40, torch.device("cpu"))
    assert torch.equal(one.view(), other.view()) and bool((other.view()[:, :, 3:] == -1).all())
