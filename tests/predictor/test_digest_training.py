"""Projections of digests: a start that loses nothing it could keep, training that helps, and vectors where they pay."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.kernels.digest import FLOOR
from attnpred.policies.select import zone_at
from attnpred.predictor.digest import Digest
from attnpred.predictor.digest_training import (
    Edges,
    LayerSample,
    Projection,
    choices,
    give_vectors,
    lost_mass,
    starting_map,
    train_projection,
)

P, HEADS, GROUP, DIM, LENGTH, STEPS, SCALE = 4, 2, 2, 8, 80, 30, 0.5
EDGES = Edges(P, 1, 1, SCALE)


def samples(count: int = 2, misleading: bool = False) -> list[LayerSample]:
    """Random documents. Misleading: the strongest directions change their sign from token to token, so a mean has none."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(HEADS, DIM, DIM, generator=generator)
    found = []
    for _ in range(count):
        keys = torch.randn(HEADS, LENGTH, DIM, generator=generator)
        queries = torch.randn(HEADS, GROUP, STEPS, DIM, generator=generator)
        if misleading:
            keys = torch.randn(HEADS, LENGTH // P, DIM, generator=generator).repeat_interleave(P, 1)
            keys[..., :2] = 4 * torch.tensor([1.0, -1.0]).repeat(LENGTH // 2)[:, None]
            queries[..., :2] *= 0.5
            queries[..., 2:] *= 2
        else:
            keys, queries = keys @ mix + 3, queries @ mix
        found.append(LayerSample(queries.half(), keys.half(), torch.arange(LENGTH - STEPS, LENGTH)))
    return found


@pytest.mark.parametrize("rank", [2, DIM])
def test_the_start_gives_keys_of_unit_variance(rank: int) -> None:
    documents = samples()
    start = starting_map(documents, rank)
    assert start.keys.shape == start.queries.shape == (HEADS, DIM, rank) and start.vectors == (1,) * HEADS
    keys = torch.cat([sample.keys.float() for sample in documents], 1)
    projected = (keys - start.centre[:, None]) @ start.keys
    assert projected.mean(1).abs().max() < 1e-3
    covariance = projected.transpose(1, 2) @ projected / keys.shape[1]
    torch.testing.assert_close(covariance, torch.eye(rank).expand(HEADS, -1, -1), atol=2e-3, rtol=0)


def test_the_start_at_full_rank_loses_nothing() -> None:
    """Centring moves all logits of a query by the same."""
    documents = samples()
    start = starting_map(documents, DIM)
    queries, keys = documents[1].queries[:, 1].float(), documents[1].keys.float()
    logits = queries @ keys.transpose(1, 2)
    got = (queries @ start.queries) @ ((keys - start.centre[:, None]) @ start.keys).transpose(1, 2)
    offset = (logits - got).mean(-1, keepdim=True)
    torch.testing.assert_close(got + offset, logits, atol=2e-3 * float(logits.abs().max()), rtol=0)


def test_the_start_keeps_the_directions_that_move_logits() -> None:
    """Strong keys that no query asks for, and queries that no key answers, are left out."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 1, 400, 4), torch.randn(1, 400, 4)
    queries[..., 0] *= 0.01
    keys[..., 0] *= 4
    keys[..., 1] *= 0.01
    start = starting_map([LayerSample(queries.half(), keys.half(), torch.arange(400))], 2)
    logits = queries[0, 0] @ (keys[0] - start.centre).T
    got = (queries[0, 0] @ start.queries[0]) @ ((keys[0] - start.centre) @ start.keys[0]).T
    assert (got - logits).square().mean() < 0.02 * logits.square().mean()


def test_training_finds_what_the_start_cannot_know() -> None:
    documents = samples(3, misleading=True)
    start = starting_map(documents, 6)
    untrained = lost_mass(Projection(start, EDGES, 1), documents, EDGES, 0.4, "check")
    trained = train_projection(start, documents, EDGES, 1, 60, "a", lr=3e-2)
    lost = lost_mass(trained, documents, EDGES, 0.4, "check")
    assert (untrained > 0.03).all() and (lost >= -1e-6).all() and (lost < 0.6 * untrained).all()


def test_the_caller_is_told_of_every_step() -> None:
    documents, told = samples(3), []
    train_projection(starting_map(documents, 4), documents, EDGES, 2, 5, "a", done=lambda: told.append(1))
    assert len(told) == 5


def test_the_seed_decides() -> None:
    documents = samples(3)
    start = starting_map(documents, 4)
    one, again, other = (train_projection(start, documents, EDGES, 2, 4, seed).as_map() for seed in ("a", "a", "b"))
    assert one.vectors == (2, 2)
    for name in ("keys", "queries", "centre"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
        assert not torch.equal(getattr(one, name), getattr(start, name))


@pytest.mark.parametrize("vectors", choices(P))
def test_training_estimates_what_a_digest_estimates(vectors: int) -> None:
    """The digest also rounds the query, to eight bits."""
    sample = samples(1)[0]
    projection = Projection(starting_map([sample], 6), EDGES, vectors)
    positions = torch.tensor([59, 70, 78])
    queries, keys = 0.3 * sample.queries[:, :, positions - 50].float(), sample.keys.float()
    with torch.no_grad():
        estimate = projection.estimate(queries, keys, EDGES.sealed(positions, LENGTH // P))
    digest = Digest(P, projection.as_map())
    digest.seal(keys[None])
    for i, position in enumerate(positions.tolist()):
        full = (position + 1) // P
        own = digest.shares(queries[:, :, i].flatten(0, 1)[None], SCALE, HEADS, full)[0]
        torch.testing.assert_close(estimate[:, i, :full].clamp_min(FLOOR), own, atol=0.1, rtol=0)
        assert (estimate[:, i, full:] < -1000).all()
        assert own.std() > 0.5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from((1, 4, 16)), st.integers(0, 3), st.integers(1, 3), st.integers(40, 120))
def test_what_there_is_to_choose_is_what_a_decode_step_may_choose(
    size: int, sinks: int, recent: int, position: int
) -> None:
    edges, blocks = Edges(size, sinks, recent, 1.0), -(-(position + 1) // size) + 2
    config = CacheConfig(block_size=size, num_sink_tokens=sinks * size, recent_window=recent * size)
    zone = zone_at(config, position + 1)
    scored = edges.scored(torch.tensor([position]), blocks)[0].nonzero().flatten().tolist()
    assert scored == list(range(zone.sinks, zone.first_recent))
    sealed = edges.sealed(torch.tensor([position]), blocks)[0].nonzero().flatten().tolist()
    assert sealed == [block for block in range(blocks) if block * size + size - 1 <= position]


def lost_at(lost: Tensor, counts: list[int], given_vectors: list[int]) -> float:
    return sum(float(lost[counts.index(count), head]) for head, count in enumerate(given_vectors))


def best_of_all(lost: Tensor, counts: list[int], total: float) -> float:
    ways = product(counts, repeat=lost.shape[1])
    return min(lost_at(lost, counts, list(way)) for way in ways if sum(way) <= total)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 60), st.integers(0, 999))
def test_vectors_never_cost_more_than_there_is(heads: int, spare: int, seed: int) -> None:
    """Whatever was measured, even that more vectors lose more; nothing is paid for what does not help."""
    lost, counts = torch.rand(4, heads, generator=torch.Generator().manual_seed(seed)), [1, 2, 4, 16]
    found = give_vectors(lost, counts, heads + spare)
    assert sum(found) <= heads + spare and set(found) <= set(counts)
    assert lost_at(lost, counts, found) <= float(lost[0].sum()) + 1e-6
    for head, count in enumerate(found):
        assert count == 1 or lost[counts.index(count), head] < lost[0, head]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(([1, 2, 3, 4], [1, 16])), st.integers(1, 4), st.integers(0, 999))
def test_vectors_go_where_they_are_best(counts: list[int], heads: int, seed: int) -> None:
    """Step by step is the best of all ways where steps cost the same and each gains less than the one before it.

    Then more bytes never lose more, and never take a vector from a head.
    """
    gains = torch.rand(len(counts) - 1, heads, generator=torch.Generator().manual_seed(seed))
    gains = gains.sort(0, descending=True).values
    lost = torch.cat((torch.zeros(1, heads), -gains.cumsum(0))) + 5
    totals = range(heads * counts[0], heads * counts[-1] + 1, counts[1] - counts[0])
    found = [give_vectors(lost, counts, total) for total in totals]
    for total, way in zip(totals, found, strict=True):
        assert lost_at(lost, counts, way) == pytest.approx(best_of_all(lost, counts, total), abs=1e-5)
    assert all(after >= before for one, two in pairwise(found) for before, after in zip(one, two, strict=True))


def test_the_head_that_looks_for_single_tokens_gets_a_vector_for_each() -> None:
    """The gain counts per vector: sixteen for one head, not two more for each of the others."""
    lost = torch.tensor([[0.05, 0.9, 0.05], [0.04, 0.88, 0.05], [0.04, 0.8, 0.05], [0.03, 0.1, 0.05]])
    assert give_vectors(lost, [1, 2, 4, 16], 18) == [1, 16, 1]
    assert give_vectors(lost, [1, 2, 4, 16], 19) == [2, 16, 1]
    assert give_vectors(lost, [1, 2, 4, 16], 17.9) == [2, 4, 1]
    needs_all = torch.tensor([[0.5, 0.9], [0.5, 0.95], [0.5, 0.95], [0.5, 0.1]])
    assert give_vectors(needs_all, [1, 2, 4, 16], 17) == [1, 16]  # past counts that do not help
