"""The fitted memory: it finds what its prompt was made of, goes on by its own guesses, and survives cache operations."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.kernels.digest import FLOOR, pack
from attnpred.predictor import told
from attnpred.predictor.digest import Digest
from attnpred.predictor.directions import Spread, key_directions, rank_for
from attnpred.predictor.fitted import PRIOR, RATE, Fitted
from attnpred.predictor.ridge import Ridge

P, HEADS, GROUP, DIM, ROWS = 4, 2, 2, 16, 64


def prompt_of(blocks: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return queries [B, Hq, ROWS, DIM] and keys [B, HEADS, blocks * P, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, HEADS * GROUP, ROWS, DIM, generator=generator),
        torch.randn(batch, HEADS, blocks * P, DIM, generator=generator),
    )


def fitted_on(rows: Tensor, query: Tensor, keys: Tensor) -> Fitted:
    """Return a memory that was shown a prompt."""
    memory = Fitted(P, (1, 2), ROWS)
    memory.meet(query, 0.3)
    memory.seal(keys)
    memory.push(rows)
    return memory


def estimates(query: Tensor, keys: Tensor) -> Tensor:
    """Return what the digest says for every query, [B, HEADS, ROWS, N]."""
    digest = Digest(P)
    digest.meet(query, 0.3)
    digest.seal(keys)
    found = torch.full((keys.shape[0], HEADS, ROWS, digest.sealed), -100.0)
    for t in range(ROWS):
        sealed = digest.sealed - (ROWS - 1 - t) // P
        found[:, :, t, :sealed] = digest.shares(query[:, :, t], 0.3, HEADS, sealed)
    return found


def test_it_learns_that_attention_goes_by_the_digest() -> None:
    """Rows that are the digest's own estimates, and then rows that never change: each is given to what makes it."""
    query, keys = prompt_of(60)
    by_digest = fitted_on(estimates(query, keys).exp(), query, keys).weights(True)[0]
    assert (by_digest[:, 0] > 0.9).all() and (by_digest[:, 1].abs() < 0.25).all()
    constant = torch.rand(1, HEADS, 1, 60).pow(4).expand(-1, -1, ROWS, -1) / 10
    by_past = fitted_on(constant, query, keys).weights(True)[0]
    assert (by_past[:, 1] > 0.9).all() and (by_past[:, 0].abs() < 0.1).all()


def test_the_forecast_learns_from_the_query_before() -> None:
    """Rows that follow the estimate of the query before them: only the forecast can use it."""
    query, keys = prompt_of(60)
    found = estimates(query, keys).exp()
    late = torch.cat((found[:, :, :1], found[:, :, :-1]), 2)
    memory = fitted_on(late, query, keys)
    assert (memory.weights(False)[..., 0] > 0.9).all() and (memory.weights(True)[..., 0].abs() < 0.3).all()


def test_the_average_of_a_prompt_is_that_of_its_rows_one_by_one() -> None:
    query, keys = prompt_of(40)
    rows = torch.rand(1, HEADS, ROWS, 41) ** 6
    memory = fitted_on(rows, query, keys)
    average = torch.zeros(1, HEADS, 41)
    for t in range(ROWS):
        rate = max(RATE, 1 / (t + 1))
        average = (1 - rate) * average + rate * rows[:, :, t]
    torch.testing.assert_close(memory.past.view()[:, :, 0], average.log().clamp_min(FLOOR), atol=1e-4, rtol=1e-4)
    more = torch.rand(1, HEADS, 1, 41) ** 6
    memory.push(more)
    average = (1 - RATE) * average + RATE * more[:, :, 0]
    torch.testing.assert_close(memory.past.view()[:, :, 0], average.log().clamp_min(FLOOR), atol=1e-4, rtol=1e-4)


def test_dense_steps_of_a_short_prompt_teach_row_by_row() -> None:
    """Each attends to everything, so its row is true: what attention goes by is found as from a prompt."""
    query, keys = prompt_of(60)
    memory = Fitted(P, (1, 2), ROWS)
    memory.digest.meet(query, 0.3)
    memory.seal(keys)
    weights = {}
    for late in (0, 1):
        memory.clear()
        memory.digest.meet(query, 0.3)
        memory.seal(keys)
        for t in range(1, ROWS):
            row = memory.digest.shares(query[:, :, t - late], 0.3, HEADS, 60).exp()
            memory.met = query[:, :, t : t + 1], 0.3
            memory.push(row[:, :, None])
            memory.look(query[:, :, t], 0.3, HEADS)
        weights[late] = memory.weights(bool(1 - late))
        assert memory.seen == ROWS - 1
    assert (weights[0][..., 0] > 0.8).all() and (weights[1][..., 0] > 0.8).all()


def test_a_block_that_was_not_attended_brings_its_own_score() -> None:
    query, keys = prompt_of(40)
    memory = fitted_on(torch.rand(1, HEADS, ROWS, 40) ** 6, query, keys)
    memory.look(query[:, :, -1], 0.3, HEADS)
    other, before = copy.deepcopy(memory), memory.past.view()[:, :, 0].exp()
    scores = memory.score(memory.weights(True), 0, 40, 40) + memory.weights(True)[..., 3:]
    selection = torch.stack([torch.randperm(40)[:9] for _ in range(HEADS)])[None]
    maxima = torch.rand(1, HEADS, 9)
    want = scores.clamp(FLOOR, 0).exp().scatter(2, selection, maxima)
    memory.push_attended(selection, maxima, 40)
    got = memory.past.view()[:, :, 0].exp()
    torch.testing.assert_close(got, (1 - RATE) * before + RATE * want, atol=1e-5, rtol=1e-3)
    row = torch.zeros(1, HEADS, 40).scatter(2, selection, maxima)
    known = torch.zeros(1, HEADS, 40, dtype=torch.bool).scatter(2, selection, True)
    other.push(row[:, :, None], known[:, :, None])
    torch.testing.assert_close(other.past.view()[:, :, 0].exp(), got, atol=1e-5, rtol=1e-3)


def test_nothing_known_is_the_prior() -> None:
    memory = Fitted(P, (1, 2), ROWS)
    memory.seal(torch.randn(3, HEADS, 8 * P, DIM))
    memory.push(torch.rand(3, HEADS, 1, 8))
    for correcting in (True, False):
        assert torch.equal(memory.weights(correcting), torch.tensor(PRIOR[correcting]).expand(3, HEADS, -1))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(("seal", "crop", "select", "repeat")), st.integers(1, 5)), max_size=8))
def test_a_digest_after_any_operations_is_the_digest_of_what_is_left(steps: list[tuple[str, int]]) -> None:
    """Codes depend on keys and directions alone, so any order of operations ends where sealing the rest at once ends."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, HEADS, 20 * P, DIM, generator=generator)
    digest = Digest(P)
    digest.seal(keys)
    for name, number in steps:
        if name == "seal":
            new = torch.randn(keys.shape[0], HEADS, number * P, DIM, generator=generator)
            keys = torch.cat((keys[:, :, : digest.sealed * P], new), 2)
            digest.seal(new)
        elif name == "crop":
            columns = max(2, digest.sealed - number)
            digest.crop(columns)
            keys = keys[:, :, : (columns - 1) * P]
        elif name == "select":
            rows = torch.tensor([number % keys.shape[0], 0])
            digest.select(rows)
            keys = keys[rows]
        elif keys.shape[0] < 8:
            digest.repeat(2)
            keys = keys.repeat_interleave(2, 0)
    assert digest.sealed == keys.shape[2] // P
    means = keys.unflatten(2, (-1, P)).mean(3)
    assert torch.equal(digest.codes.view(), pack((means - digest.centre) @ digest.to_keys))
    query = torch.randn(keys.shape[0], GROUP * HEADS, DIM, generator=generator)
    digest.look(query, 0.5, HEADS)
    torch.testing.assert_close(digest.estimate, exactly(digest, query), atol=0.1, rtol=0)


def exactly(digest: Digest, query: Tensor) -> Tensor:
    """Return the estimate [B, HEADS, N] without the rounding of queries."""
    shares = torch.softmax(digest.logits(query[:, :, None], 0.5, digest.sealed), -1)[:, :, 0]
    return shares.unflatten(1, (HEADS, GROUP)).sum(2).log().clamp_min(FLOOR)


def test_a_row_has_the_digest_that_it_has_alone() -> None:
    query, keys = prompt_of(12, batch=2)
    keys = keys * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    found = []
    for rows in (slice(0, 2), slice(1, 2)):
        digest = Digest(P)
        digest.meet(query[rows], 0.3)
        digest.seal(keys[rows])
        found.append(digest.shares(query[rows, :, -1], 0.3, HEADS, 12)[-1])
    torch.testing.assert_close(*found)


def test_the_state_is_small() -> None:
    """Codes and past, per byte of half-precision keys and values: counted, not believed."""
    for size, codes in ((4, 12), (8, 24), (16, 32)):  # blocks of 64 dimensions
        memory = Fitted(size, (1, 2), ROWS)
        memory.seal(torch.randn(1, HEADS, 80 * size, 64))
        memory.push(torch.rand(1, HEADS, 1, 80))
        assert memory.bytes() == 80 * HEADS * (codes + 4)
        assert memory.bytes() / (80 * HEADS * size * 64 * 2 * 2) < 0.02


@pytest.mark.parametrize("skipped", [0, 3])
def test_what_rows_tell_is_a_loop_over_rows_and_blocks(skipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates over the blocks that were sealed then, the query before for the forecast, distances, values, weights."""
    monkeypatch.setattr(told, "ELEMENTS", 1)  # one row at a time
    query, keys = prompt_of(30)
    count, first, last = 9, 2, 24
    digest = Digest(P)
    digest.meet(query, 0.3)
    digest.seal(keys)
    query = query[:, :, -count:]
    earlier = torch.randn(1, HEADS, 30)
    digest.estimate = earlier
    rows, averages = torch.rand(1, HEADS, count, 31), torch.rand(1, HEADS, count, last - first)
    found: dict[bool, list[told.Told]] = {True: [], False: []}
    for one in told.told_by(rows, averages, query, 0.3, digest, first, last, skipped):
        found[one.correcting].append(one)
    logits = digest.logits(query, 0.3, 30)
    sealed = [30 - (count - 1 - t) // P for t in range(count)]
    estimate = [
        torch.softmax(logits[:, :, t, : sealed[t]], -1).unflatten(1, (HEADS, GROUP)).sum(2).log()[..., first:last]
        for t in range(count)
    ]
    before = [earlier[..., first:last], *estimate]
    assert len(found[True]) == len(found[False]) == count - skipped
    for t in range(skipped, count):
        distance = torch.tensor([math.log2(sealed[t] - n) for n in range(first, last)])
        for correcting, wanted in ((True, estimate[t]), (False, before[t])):
            features, values, weights = found[correcting][t - skipped][1:]
            torch.testing.assert_close(features[:, :, 0], wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(features[:, :, 1], averages[:, :, t].log())
            torch.testing.assert_close(features[0, 0, 2], distance)
            assert (features[:, :, 3] == 1).all()
            torch.testing.assert_close(values, rows[:, :, t, first:last].log())
            torch.testing.assert_close(weights, rows[:, :, t, first:last].sqrt())


# Directions


def spread_of(queries: Tensor) -> Spread:
    return Spread(torch.zeros(1, queries.shape[1], queries.shape[3], queries.shape[3]), 0).and_new(queries)


@pytest.mark.parametrize(
    ("dim", "block_size", "rank"), [(64, 16, 64), (64, 8, 48), (64, 4, 24), (128, 4, 48), (5, 16, 6), (8, 1, 2)]
)
def test_a_digest_takes_the_same_bytes_for_a_token_up_to_all_directions(dim: int, block_size: int, rank: int) -> None:
    assert rank_for(dim, block_size) == rank


def test_all_directions_give_the_logits_themselves() -> None:
    queries, means = torch.randn(1, HEADS, 50, DIM), torch.randn(1, HEADS, 90, DIM)
    to_keys, to_queries = key_directions(spread_of(queries), means, DIM)
    got = (queries @ to_queries) @ (means @ to_keys).transpose(-1, -2)
    torch.testing.assert_close(got, queries @ means.transpose(-1, -2), atol=1e-3, rtol=1e-3)
    assert (means @ to_keys).square().mean(2).allclose(torch.ones(DIM), atol=1e-3)


def test_old_queries_count_for_no_more_than_the_new() -> None:
    old, new = torch.randn(1, HEADS, 50, DIM), torch.randn(1, HEADS, 10, DIM)
    both = spread_of(old).and_new(new)
    want = spread_of(old).sums / 50 + spread_of(new).sums / 10
    torch.testing.assert_close(both.sums / both.queries, want / 2)
    few = spread_of(new).and_new(old)
    torch.testing.assert_close(few.sums, spread_of(torch.cat((old, new), 2)).sums)
    assert (both.queries, few.queries) == (20, 60) and both.and_new(new[:, :, :0]) is both


def test_a_question_finds_what_the_text_never_looked_for() -> None:
    """Queries of the text look in the first dimensions, those of a question in the last, where keys are as far apart."""
    keys, queries = torch.randn(1, 1, 60 * P, 32), torch.randn(1, 2, 64, 32)
    queries[..., 16:] *= 1e-3
    question = torch.cat((torch.zeros(1, 2, 20, 24), 2 * torch.randn(1, 2, 20, 8)), 3)
    means = keys.unflatten(2, (-1, P)).mean(3)
    true = torch.softmax(question[:, :, -1] @ means[:, 0].transpose(-1, -2), -1).sum(1, keepdim=True).log()
    digest, error = Digest(P), []
    digest.meet(queries, 1.0)
    digest.seal(keys)
    for is_new in (False, True):
        if is_new:
            digest.meet(question, 1.0)
            digest.renew(means)
        error.append(float((digest.shares(question[:, :, -1], 1.0, 1, 60) - true).norm() / (true - true.mean()).norm()))
    assert error[0] > 0.9 and error[1] < 0.6, error


def test_directions_that_no_query_looks_in_are_left_out() -> None:
    """Keys spread most where queries are not: the plain principal components of the keys would lose every logit."""
    queries, means = torch.randn(1, 1, 2000, 8), torch.randn(1, 1, 300, 8)
    queries[..., 4:] *= 1e-3
    means[..., 4:] *= 3
    to_keys, to_queries = key_directions(spread_of(queries), means, 4)
    true = queries @ means.transpose(-1, -2)
    error = (queries @ to_queries) @ (means @ to_keys).transpose(-1, -2) - true
    assert error.norm() < 0.3 * true.norm()


# Ridge


def test_ridge_finds_the_weights_and_else_keeps_the_prior() -> None:
    want = torch.randn(2, 3, 4)
    table = torch.randn(2, 3, 4, 500)
    ridge = Ridge()
    for part in table.chunk(5, 3):
        ridge.add(part, (part * want[..., None]).sum(2), torch.rand(2, 3, part.shape[3]) + 0.5)
    torch.testing.assert_close(ridge.solve(torch.zeros(4)), want, atol=0.02, rtol=0.02)
    nothing = Ridge()
    nothing.add(torch.zeros(1, 1, 4, 7), torch.ones(1, 1, 7), torch.ones(1, 1, 7))
    prior = torch.tensor([0.5, 1.0, -1.0, 0.0])
    assert torch.equal(nothing.solve(prior)[0, 0], prior)


def test_queries_that_were_met_follow_their_rows() -> None:
    """Beams may be chosen between the call that brings the queries and the block that becomes full after it."""
    query, keys = prompt_of(12, batch=2)
    rows = torch.tensor([1, 0, 1])
    whole, chosen = Digest(P), Digest(P)
    whole.meet(query[rows], 0.3)
    chosen.meet(query, 0.3)
    chosen.select(rows)
    for digest in (whole, chosen):
        digest.seal(keys[rows])
    assert torch.equal(whole.to_queries, chosen.to_queries)
    memory = Fitted(P, (1, 2), ROWS)
    memory.meet(query, 0.3)
    memory.repeat(2)
    memory.seal(keys.repeat_interleave(2, 0))
    memory.push(torch.rand(4, HEADS, ROWS, 12))
    assert memory.weights(True).shape == (4, HEADS, 4)
