"""A whole selection in one call equals its parts (estimate, weighing, choice), whatever the tables and the head sharing."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred import kernels
from attnpred.predictor.digest import Digest, DigestMap
from attnpred.predictor.streaming import FEATURES, Stream

pytestmark = pytest.mark.skipif(kernels.DIGEST != "numba", reason="numba is not installed")


def stream_of(batch: int, kv_heads: int, dim: int, blocks: int, trained: bool, seed: int) -> Stream:
    """Return a memory that has seen keys of `blocks` blocks of 4, with projections of its own heads or without."""
    generator = torch.Generator().manual_seed(seed)
    given_map = None
    if trained:
        maps = [torch.randn(kv_heads, dim, 6, generator=generator) for _ in range(2)]
        centre = torch.randn(kv_heads, dim, generator=generator)
        given_map = DigestMap(*maps, centre, tuple((1, 4, 2)[i % 3] for i in range(kv_heads)))
    stream = Stream(4, given_map, 8)
    stream.seal(torch.randn(batch, kv_heads, blocks * 4, dim, generator=generator))
    return stream


def plainly(stream: Stream, call: str, *arguments: object) -> torch.Tensor:
    """Call a method of `stream` with torch's kernels."""
    torch_only = {name: kernels.STREAM_BACKENDS["torch"][name] for name in kernels.STREAM}
    with (
        mock.patch.object(kernels, "has_native_selection", lambda tensor: False),
        mock.patch.object(kernels, "digest_shares", kernels.DIGEST_BACKENDS["reference"]),
        mock.patch.multiple(kernels, **torch_only),
    ):
        return getattr(stream, call)(*arguments)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 2), st.integers(1, 4), st.sampled_from((1, 2, 5)), st.booleans(), st.booleans(),
    st.sampled_from((5, 8)), st.integers(8, 90), st.integers(0, 99), st.data(),
)  # fmt: skip
def test_a_selection_in_one_call_equals_its_parts(
    batch: int, kv_heads: int, group: int, per_query_head: bool, trained: bool, dim: int, blocks: int, seed: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    stream = stream_of(batch, kv_heads, dim, blocks, trained, seed)
    selecting = kv_heads * (group if per_query_head else 1)
    query = torch.randn(batch, kv_heads * group, dim)
    stream.push(torch.rand(batch, selecting, 3, blocks + 1) ** 8)
    weights = torch.randn(selecting if data.draw(st.booleans()) else 1, FEATURES)
    sinks, recent = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    first_recent, zone_blocks = blocks - recent, blocks + 1
    free = data.draw(st.integers(0, first_recent - sinks))
    stream.look(query, 0.3, selecting)
    taken = stream.digest.take_asked()
    assert taken is not None
    got = stream.choose(weights, sinks, first_recent, zone_blocks, free)
    estimate = stream.digest.estimate
    stream.look(query, 0.3, selecting)
    want = plainly(stream, "score", weights, sinks, first_recent, zone_blocks)
    worst = (estimate - stream.digest.estimate).abs().max().item()
    assert worst < 0.3  # codes and queries are rounded; `test_digest` has the exact bound
    assert got[..., :sinks].tolist() == torch.arange(sinks).expand(batch, selecting, -1).tolist()
    assert (got[..., sinks + free :] == torch.arange(first_recent, zone_blocks)).all()
    kept = got[..., sinks : sinks + free]
    assert all(len(set(row.tolist())) == free for row in kept.flatten(0, 1))
    # The scores of what was kept are the best there are, up to what rounding the estimate makes of them.
    slack = 2 * worst * weights[:, 0].abs().max().item() + 1e-4
    best = want[..., sinks:first_recent].sort(-1, descending=True).values[..., :free]
    assert (want.gather(-1, kept).sort(-1, descending=True).values >= best - slack).all()


def test_the_estimate_is_the_same_whoever_asks() -> None:
    stream, query = stream_of(2, 3, 8, 700, True, 1), torch.randn(2, 6, 8)
    stream.push(torch.rand(2, 3, 1, 701))
    stream.look(query, 0.3, 3)
    stream.choose(torch.randn(1, FEATURES), 1, 690, 701, 40)
    with_choice = stream.digest.estimate
    stream.look(query, 0.3, 3)
    assert torch.equal(stream.digest.estimate, with_choice)


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
    stream, query = stream_of(1, 2, 8, 40, False, 1), torch.randn(1, 4, 8)
    before = stream.digest.shares(query, 0.5, 2, 40)
    stream.seal(torch.randn(1, 2, 400 * 4, 8))  # the tables grow
    after = stream.digest.shares(query, 0.5, 2, 40)
    torch.testing.assert_close(after, before)


def test_a_copy_looks_into_its_own_codes() -> None:
    stream, query = stream_of(1, 2, 8, 40, False, 1), torch.randn(1, 4, 8)
    before = stream.digest.shares(query, 0.5, 2, 40)
    copied = copy.deepcopy(stream)
    assert copied.digest._prepared is None  # addresses of the first one's memory, which may be gone by then
    stream.digest.codes[0][2].data.zero_()
    assert torch.equal(copied.digest.shares(query, 0.5, 2, 40), before)
    assert not torch.equal(stream.digest.shares(query, 0.5, 2, 40), before)


def test_same_result_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnpred.kernels import numba_digest

    monkeypatch.setattr(numba_digest, "_PAYS", 0)
    stream, query, weights = stream_of(1, 5, 8, 3000, True, 1), torch.randn(1, 10, 8), torch.randn(5, FEATURES)
    stream.push(torch.rand(1, 5, 1, 3001))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            stream.look(query, 0.3, 5)
            found.append((stream.choose(weights, 1, 2990, 3001, 99), stream.digest.estimate))
    finally:
        torch.set_num_threads(before)
    for chosen, estimate in found[1:]:
        assert torch.equal(chosen, found[0][0]) and torch.equal(estimate, found[0][1])
