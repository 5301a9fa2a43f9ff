"""A whole selection in one call equals its parts (estimate, weighing, choice), whatever the tables and the head sharing."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred import kernels
from attnpred.predictor.digest import Digest
from attnpred.predictor.fitted import Fitted

pytestmark = pytest.mark.skipif(kernels.DIGEST != "numba", reason="numba is not installed")


def fitted_of(batch: int, kv_heads: int, dim: int, blocks: int, seed: int, group: int = 2) -> Fitted:
    """Return a memory that has seen keys of `blocks` blocks of 4, and the last queries of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    memory = Fitted(4, (0, 0), 8)
    memory.meet(torch.randn(batch, kv_heads * group, 8, dim, generator=generator), 0.3)
    memory.seal(torch.randn(batch, kv_heads, blocks * 4, dim, generator=generator))
    return memory


def plainly(memory: Fitted, call: str, *arguments: object) -> torch.Tensor:
    """Call a method of `memory` with torch's kernels."""
    torch_only = {name: kernels.STREAM_BACKENDS["torch"][name] for name in kernels.STREAM}
    with (
        mock.patch.object(kernels, "has_native_selection", lambda tensor: False),
        mock.patch.object(kernels, "digest_shares", kernels.DIGEST_BACKENDS["reference"]),
        mock.patch.multiple(kernels, **torch_only),
    ):
        return getattr(memory, call)(*arguments)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 2), st.integers(1, 4), st.sampled_from((1, 2, 5)), st.booleans(), st.sampled_from((5, 16, 24)),
    st.integers(8, 90), st.integers(0, 99), st.data(),
)  # fmt: skip
def test_a_selection_in_one_call_equals_its_parts(
    batch: int, kv_heads: int, group: int, per_query_head: bool, dim: int, blocks: int, seed: int, data: st.DataObject
) -> None:
    memory = fitted_of(batch, kv_heads, dim, blocks, seed, group)
    selecting = kv_heads * (group if per_query_head else 1)
    query = torch.randn(batch, kv_heads * group, dim)
    memory.push(torch.rand(batch, selecting, 3, blocks + 1) ** 8)
    weights = torch.randn(batch, selecting, 4)
    memory._weights[True] = weights
    sinks, recent = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    first_recent, zone_blocks = blocks - recent, blocks + 1
    free = data.draw(st.integers(0, first_recent - sinks))
    memory.look(query, 0.3, selecting)
    taken = memory.digest.take_asked()
    assert taken is not None
    got = memory.choose(True, sinks, first_recent, zone_blocks, free)
    estimate = memory.digest.estimate
    memory.look(query, 0.3, selecting)
    want = plainly(memory, "score", weights, sinks, first_recent, zone_blocks)
    worst = (estimate - memory.digest.estimate).abs().max().item()
    assert worst < 0.3  # codes and queries are rounded; `test_digest` has the exact bound
    assert got[..., :sinks].tolist() == torch.arange(sinks).expand(batch, selecting, -1).tolist()
    assert (got[..., sinks + free :] == torch.arange(first_recent, zone_blocks)).all()
    kept = got[..., sinks : sinks + free]
    assert all(len(set(row.tolist())) == free for row in kept.flatten(0, 1))
    # The scores of what was kept are the best there are, up to what rounding the estimate makes of them.
    slack = 2 * worst * weights[..., 0].abs().max().item() + 1e-4
    best = want[..., sinks:first_recent].sort(-1, descending=True).values[..., :free]
    assert (want.gather(-1, kept).sort(-1, descending=True).values >= best - slack).all()


def test_the_estimate_is_the_same_whoever_asks() -> None:
    memory, query = fitted_of(2, 3, 8, 700, 1), torch.randn(2, 6, 8)
    memory.push(torch.rand(2, 3, 1, 701))
    memory.look(query, 0.3, 3)
    memory.choose(True, 1, 690, 701, 40)
    with_choice = memory.digest.estimate
    memory.look(query, 0.3, 3)
    assert torch.equal(memory.digest.estimate, with_choice)


def test_what_was_asked_is_answered_before_the_codes_change() -> None:
    for change in (
        lambda digest: digest.seal(torch.randn(1, 2, 8, 8)),
        lambda digest: digest.crop(20),
        lambda digest: digest.repeat(2),
        lambda digest: digest.select(torch.tensor([0, 0])),
    ):
        digest = Digest(4)
        digest.seal(torch.randn(1, 2, 40 * 4, 8))
        query = torch.randn(1, 4, 8)
        want = digest.shares(query, 0.5, 2, 40)
        digest.look(query, 0.5, 2)
        change(digest)
        assert torch.equal(digest.estimate[:1], want)


def test_codes_are_found_again_after_they_moved() -> None:
    memory, query = fitted_of(1, 2, 8, 40, 1), torch.randn(1, 4, 8)
    before = memory.digest.shares(query, 0.5, 2, 40)
    memory.seal(torch.randn(1, 2, 400 * 4, 8))  # the tables grow
    after = memory.digest.shares(query, 0.5, 2, 40)
    torch.testing.assert_close(after, before)


def test_a_copy_looks_into_its_own_codes() -> None:
    memory, query = fitted_of(1, 2, 8, 40, 1), torch.randn(1, 4, 8)
    before = memory.digest.shares(query, 0.5, 2, 40)
    copied = copy.deepcopy(memory)
    assert copied.digest._prepared is None  # addresses of the first one's memory, which may be gone by then
    memory.digest.codes.data.zero_()
    assert torch.equal(copied.digest.shares(query, 0.5, 2, 40), before)
    assert not torch.equal(memory.digest.shares(query, 0.5, 2, 40), before)


def test_same_result_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpred.kernels import numba_digest

    monkeypatch.setattr(numba_digest, "_PAYS", 0)
    memory, query = fitted_of(1, 5, 8, 3000, 1), torch.randn(1, 10, 8)
    memory.push(torch.rand(1, 5, 1, 3001))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            memory.look(query, 0.3, 5)
            found.append((memory.choose(True, 1, 2990, 3001, 99), memory.digest.estimate))
    finally:
        torch.set_num_threads(before)
    for chosen, estimate in found[1:]:
        assert torch.equal(chosen, found[0][0]) and torch.equal(estimate, found[0][1])
