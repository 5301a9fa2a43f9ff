"""Blocks that the forecast missed are let in up to a limit, the best first; blocks attended last are kept if asked for."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies import Predicted
from attnpred.policies.select import Zone, limit_late, select_blocks
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

P, DIM, PROMPT, STEPS = 4, 8, 101, 14


@pytest.mark.parametrize("scarce", [False, True])
@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_limited_correction_against_a_loop(scarce: bool, data: st.DataObject) -> None:
    """The forecast's blocks compete with the `late` best others, and with no more; scarce: there are fewer others."""
    sinks, middle, recent = data.draw(st.integers(0, 2)), data.draw(st.integers(2, 14)), data.draw(st.integers(1, 3))
    free = data.draw(st.integers(1, middle))
    late = data.draw(st.integers(middle - free + 1, middle + 2) if scarce else st.integers(0, middle - free))
    between = range(sinks, sinks + middle)
    zone = Zone(0, sinks + middle + recent, sinks, sinks + middle, free)
    forecast = [data.draw(st.permutations(between))[:free] for _ in range(2)]
    scores = torch.rand(1, 2, zone.blocks, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    selection = select_blocks(limit_late(scores, zone, torch.tensor([forecast]), late), zone)[0]
    for head, known in enumerate(forecast):
        by_score = sorted(between, key=lambda block: -float(scores[0, head, block]))
        others = [block for block in by_score if block not in known][:late]
        want = [block for block in by_score if block in known or block in others][:free]
        edges = [block for block in range(zone.blocks) if block not in between]
        assert sorted(selection[head].tolist()) == sorted(edges + want)
        assert late > 0 or set(want) == set(known)
        assert late < free or want == by_score[:free]  # then it is the plain choice


def test_a_row_with_few_blocks_keeps_its_forecast() -> None:
    """Left padding: the forecast of the second row has places without a block."""
    zone, first = Zone(0, 16, 1, 14, 5), torch.tensor([0, 10])
    forecast = select_blocks(torch.rand(2, 1, 16), zone, first)
    middle = forecast[..., 1:6]
    assert (middle[1] < 0).any()
    kept = select_blocks(limit_late(torch.rand(2, 1, 16), zone, middle, 0), zone, first)
    assert torch.equal(kept.sort().values, forecast.sort().values)


def decode(late_share: float | None, hysteresis: float = 0.0, budget: int = 9 * P) -> tuple[list[Tensor], LayerCounts]:
    """Return the blocks of each step, [Hkv, K], sorted, and the counters; queries turn at random, keys are many."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    config = CacheConfig(
        budget=budget,
        block_size=P,
        num_sink_tokens=P,
        recent_window=2 * P,
        history=6,
        calibration_interval=0,
        late_share=late_share,
        hysteresis=hysteresis,
    )
    policy = Predicted()
    decoder, pool, terms = LayerDecoder(config, policy, LayerCounts()), BlockPool(P), AttentionTerms(1.0)
    keys = torch.randn(1, 2, PROMPT + STEPS, DIM, generator=generator)
    queries = torch.randn(1, 4, PROMPT + STEPS, DIM, generator=generator)
    pool.append(keys[:, :, :PROMPT], keys[:, :, :PROMPT])
    decoder.observe(queries[:, :, :PROMPT], pool, terms, None, prompt=True)
    # A forecast that takes what the last query wanted least: so the correction has other blocks to bring at every step.
    weights = torch.zeros(2, 1, 2, 4)
    weights[0, ..., 0], weights[1, ..., 0] = -1.0, 1.0
    decoder.memory._weights = {False: weights[0], True: weights[1]}
    decoder.chooser.forecast(decoder._call(queries[:, :, PROMPT - 1], pool, terms, None))
    found = []
    for t in range(PROMPT, PROMPT + STEPS):
        pool.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1])
        decoder.step(queries[:, :, t], pool, terms, None)
        found.append(decoder.attended[1][0].sort().values)
    return found, decoder.counts


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("late_share", [0.12, 0.25, 0.5])
def test_what_comes_late_stays_below_the_setting(late_share: float) -> None:
    _, counts = decode(late_share)
    # 8 or 9 blocks a step; the limit is in whole blocks, and with such queries every step would use it up
    assert late_share - 1 / 8 < counts.as_dict()["late_share"] <= late_share


def test_no_share_is_the_forecast_and_a_full_share_is_the_correction() -> None:
    forecast, corrected = decode(0)[0], decode(None)[0]
    assert not same(forecast, corrected)
    assert same(decode(1.0)[0], corrected)
    tiny, counts = decode(0.1)  # less than one block of nine
    assert same(tiny, forecast) and counts.as_dict()["late_share"] == 0


@pytest.mark.parametrize("late_share", [None, 0, 0.3])
def test_hysteresis_keeps_what_was_attended(late_share: float | None) -> None:
    """A block that was not attended only comes in where the recent window grows; a bonus of next to nothing does nothing."""
    free = decode(late_share)[0]
    assert same(decode(late_share, hysteresis=1e-6)[0], free)
    bound = decode(late_share, hysteresis=1e4)[0]
    for t in range(1, STEPS):
        tokens = PROMPT + t  # in the step before
        for head in range(2):
            new = set(bound[t][head].tolist()) - set(bound[t - 1][head].tolist())
            assert new <= ({tokens // P} if tokens % P == 0 else set())
    changes = sum(len(set(b[0].tolist()) - set(a[0].tolist())) for a, b in pairwise(free))
    assert changes > STEPS


def test_blocks_before_a_padded_row_begins_do_not_use_up_late_places() -> None:
    zone = Zone(40, 10, 1, 8, 3)
    scores = torch.arange(10.0).flip(0).expand(2, 1, -1)  # early blocks score best
    forecast = torch.tensor([[[5, 6, 7]], [[5, 6, 7]]])
    first = torch.tensor([0, 3])
    chosen = select_blocks(limit_late(scores, zone, forecast, 1, first), zone, first)[..., 1:4]
    assert [sorted(row) for row in chosen[:, 0].tolist()] == [[1, 5, 6], [4, 5, 6]]
