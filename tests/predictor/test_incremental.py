"""`IncrementalCNN` equals the whole network over a `History`, whatever happens between two steps, and costs a few rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.errors import ShapeError
from attnpred.predictor import incremental
from attnpred.predictor.cnn import PaperCNN, UnpaddedCNN, start_as_average
from attnpred.predictor.history import History
from attnpred.predictor.incremental import IncrementalCNN

KINDS = (PaperCNN, UnpaddedCNN)


def network(kind: type[PaperCNN] = PaperCNN, history: int = 16) -> PaperCNN:
    """Return a network with the large weights on the newest rows that training starts from, and noise."""
    torch.manual_seed(0)
    net = kind()
    start_as_average(net, history)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def scores(net: PaperCNN, history: History, first: int, last: int) -> Tensor:
    """Return what the whole network says; columns that were never seen are zero."""
    rows = torch.nn.functional.pad(history.ordered(), (0, max(0, last - history.ring.count)))
    with torch.no_grad():
        return net(rows[..., first:last].flatten(0, 1)).unflatten(0, rows.shape[:2])


OPERATIONS = "push push push several grow crop select mask repeat clear first skip wide".split()


@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 2, 4, 5, 6, 7, 9, 16]),
    steps=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 9)), min_size=1, max_size=40),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_the_whole_network(kind: type[PaperCNN], size: int, steps: list[tuple[str, int]]) -> None:
    size = max(size, 5) if kind is UnpaddedCNN else size
    generator = torch.Generator().manual_seed(size)
    net, history = network(kind, size), History(size)
    state = IncrementalCNN(net, size)
    batch, columns, first, recent = 2, 11, 1, 2
    for name, number in steps:
        added = 0
        if name in ("push", "several", "grow"):
            columns += number % 3 if name == "grow" else 0
            added = number if name == "several" else 1
        elif name == "crop":
            columns = max(5, columns - number)
            history.crop(columns)
            state.crop(columns)
        elif name == "first":
            first = number % 3
        elif name == "wide":  # the zone may end beyond the last column seen, when no block is recent
            recent = number % 4 - 1
        elif name == "clear":
            history.clear()
            state.clear()
            batch = 1 + number % 3
        elif history.count and name in ("select", "mask"):
            index = torch.tensor([number % batch, batch - 1])
            if name == "mask":
                index = torch.ones(batch, dtype=torch.bool)
                index[0] = batch == 1
            history.select(index)
            state.select(index)
            batch = len(torch.arange(batch)[index])
        elif history.count and name == "repeat" and batch < 4:
            history.repeat(2)
            state.repeat(2)
            batch *= 2
        if added:
            rows = torch.rand(batch, 2, added, columns, generator=generator)
            history.push(rows)
            state.push(rows)
        assert state.is_empty == history.is_empty
        if history.count and name != "skip":
            assert torch.equal(state.ordered(), history.ordered())
            if number % 3:  # else the next call finds more than one thing changed
                last = columns - recent
                want = scores(net, history, first, last) if last - first >= 3 else torch.ones(batch, 2, last - first)
                torch.testing.assert_close(state.scores(first, last), want, atol=1e-5, rtol=0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of features which each call of the second convolution computes."""
    counts: list[int] = []
    original = incremental.conv2d

    def counting(image: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        output = original(image, weight, *args, **kwargs)
        if weight.shape[0] == 32:
            counts.append(output[:, 0].numel())
        return output

    monkeypatch.setattr(incremental, "conv2d", counting)
    return counts


@pytest.mark.parametrize(("kind", "rows_per_step"), [(PaperCNN, 5), (UnpaddedCNN, 1)])
def test_hundreds_of_steps_cost_a_few_rows_each(kind: type[PaperCNN], rows_per_step: int, computed: list[int]) -> None:
    net, history, heads, size, columns = network(kind, 32), History(32), 2, 32, 40
    state = IncrementalCNN(net, size)
    for step in range(400):
        grows = step % 16 == 15
        columns += grows
        row = torch.rand(1, heads, 1, columns) ** 4
        history.push(row)
        state.push(row)
        computed.clear()
        got = state.scores(1, columns - 4)
        torch.testing.assert_close(got, scores(net, history, 1, columns - 4), atol=1e-5, rtol=0)
        width = columns - 5
        tail = net.averaged(size) * 5 if grows else 0  # the new column, two that saw the border, two for context
        assert sum(computed) == heads * (rows_per_step * width + tail) or step == 0
    assert state.rebuilds == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_zone_may_go_back_and_forth_between_rows(kind: type[PaperCNN]) -> None:
    net, history = network(kind), History(16)
    state = IncrementalCNN(net, 16)
    for _ in range(20):
        row = torch.rand(1, 1, 1, 30)
        for each in (history, state):
            each.push(row)
        for last in (20, 30):
            torch.testing.assert_close(state.scores(1, last), scores(net, history, 1, last), atol=1e-5, rtol=0)
    assert state.rebuilds == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", range(1, 14))
def test_several_rows_at_once_cost_one_row_more_each(kind: type[PaperCNN], added: int, computed: list[int]) -> None:
    net, history = network(kind), History(16)
    state = IncrementalCNN(net, 16)
    for count in (20, added, 0):
        rows = torch.rand(1, 1, count, 9)
        history.push(rows)
        state.push(rows)
        computed.clear()
        torch.testing.assert_close(state.scores(0, 9), scores(net, history, 0, 9), atol=1e-5, rtol=0)
        if count == added:
            edges = 4 if kind is PaperCNN else 0
            assert sum(computed) == 9 * (min(added, 12) + edges)
    assert computed == []  # nothing was new
    assert state.rebuilds == (1 if added < 12 else 2)


def test_a_shorter_zone_is_no_reason_to_compute_everything(computed: list[int]) -> None:
    """Drafted tokens come and go: `crop` and an earlier end of the zone renew the columns at the end alone."""
    net, history = network(), History(16)
    state = IncrementalCNN(net, 16)
    for columns in (40, 41, 39, 41, 40):
        row = torch.rand(1, 1, 1, columns)
        for each in (history, state):
            each.crop(columns - 1)
            each.push(row)
        computed.clear()
        got = state.scores(0, columns)
        torch.testing.assert_close(got, scores(net, history, 0, columns), atol=1e-5, rtol=0)
    assert state.rebuilds == 1 and sum(computed) < 16 * 40 // 2


def test_a_prompt_and_another_first_block_compute_everything() -> None:
    state = IncrementalCNN(network(), 16)
    state.push(torch.rand(1, 1, 40, 30))
    state.scores(1, 28)
    state.push(torch.rand(1, 1, 1, 30))
    state.scores(1, 28)
    assert state.rebuilds == 1
    state.scores(2, 28)
    assert state.rebuilds == 2
    state.push(torch.rand(1, 1, 16, 30))
    state.scores(2, 28)
    assert state.rebuilds == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_leaves_with_its_row(kind: type[PaperCNN]) -> None:
    state = IncrementalCNN(network(kind), 16)
    for step in range(40):
        row = torch.rand(1, 1, 1, 12)
        state.push(row * torch.nan if step == 20 else row)
        assert state.scores(0, 12).isnan().any() == (20 <= step < 36)
    assert state.rebuilds == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_workspace_changes_nothing(
    kind: type[PaperCNN], monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    net, rows = network(kind), torch.rand(3, 2, 23, 12)
    state = IncrementalCNN(net, 23)
    state.push(rows)
    want = state.scores(0, 12)
    monkeypatch.setattr(incremental, "CPU_WORKSPACE_BYTES", 10 * 12 * 32 * 4)  # ten rows of one image
    state.clear()
    state.push(rows)
    computed.clear()
    torch.testing.assert_close(state.scores(0, 12), want, atol=1e-5, rtol=0)
    assert max(computed) <= 10 * 12 and sum(computed) == 6 * net.averaged(23) * 12


def test_an_interrupted_call_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    net, history = network(), History(16)
    state = IncrementalCNN(net, 16)
    for each in (history, state):
        each.push(torch.ones(1, 1, 1, 12))
    state.scores(0, 12)
    with monkeypatch.context() as patch:
        patch.setattr(incremental, "contributions", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            state.scores(0, 11)
    torch.testing.assert_close(state.scores(0, 11), scores(net, history, 0, 11), atol=1e-5, rtol=0)


def test_a_zone_may_end_beyond_all_that_was_seen() -> None:
    net, history = network(), History(16)
    state = IncrementalCNN(net, 16)
    for columns in (9, 9 + 16):  # the second fills what the first had reserved
        row = torch.rand(1, 1, 1, columns)
        history.push(row)
        state.push(row)
        got = state.scores(1, columns + 1)
        torch.testing.assert_close(got, scores(net, history, 1, columns + 1), atol=1e-5, rtol=0)
    assert history.ring.data.shape[3] == columns and state.rebuilds == 1


@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_zone_too_narrow_to_score_gets_ones(width: int) -> None:
    state = IncrementalCNN(network(), 16)
    state.push(torch.rand(2, 3, 1, 12))
    assert torch.equal(state.scores(4, 4 + width), torch.ones(2, 3, width))
    assert state.rebuilds == 0


def test_what_cannot_be_scored_is_an_error() -> None:
    with pytest.raises(ShapeError, match="got 4 history rows, expected at least 5"):
        IncrementalCNN(UnpaddedCNN(), 4)
    with pytest.raises(ShapeError, match=r"got rows of shape \(0,\)"):
        IncrementalCNN(PaperCNN(), 4).scores(0, 9)
