"""The decode step equals a simulation written from the description of the method, with loops and lists.

The simulation attends token by token, keeps history rows as plain lists, and follows the published order: predict from
rows up to t-1, attend, append the row of step t (the true one every M steps), drop the oldest.
"""

import math
from typing import Any

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies import LastStep, Quest
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

P, SINK, RECENT, H, M, BUDGET = 4, 4, 8, 6, 3, 36
HEADS, KV_HEADS, DIM, PROMPT, STEPS = 4, 2, 8, 62, 14
SCALE = 0.5


def softmax_over(query: list[float], keys: list[list[float]], tokens: list[int]) -> dict[int, float]:
    logits = {i: SCALE * sum(a * b for a, b in zip(query, keys[i], strict=True)) for i in tokens}
    total = sum(math.exp(x) for x in logits.values())
    return {i: math.exp(x) / total for i, x in logits.items()}


def block_row(weights: dict[int, float], length: int) -> list[float]:
    return [max((weights.get(i, 0.0) for i in range(n * P, n * P + P)), default=0.0) for n in range(-(-length // P))]


class Simulation:
    """One layer of AttentionPredictor for one sequence, from the paper's description."""

    def __init__(self, network: torch.nn.Module, groups: list[list[int]]) -> None:
        self.network, self.groups = network, groups
        self.rows: list[list[list[float]]] = [[] for _ in groups]

    def row_of(self, group: list[int], weights: dict[int, dict[int, float]], length: int) -> list[float]:
        return [max(values) for values in zip(*(block_row(weights[h], length) for h in group), strict=True)]

    def remember(self, s: int, row: list[float]) -> None:
        self.rows[s] = [*self.rows[s], row][-H:]

    def prefill(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        for t in range(PROMPT - H, PROMPT):
            for s, group in enumerate(self.groups):
                weights = {h: self.attend(queries, keys, h, t, list(range(t + 1))) for h in group}
                self.remember(s, self.row_of(group, weights, t + 1))

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, h: int, t: int, tokens: list[int]) -> dict[int, float]:
        return softmax_over(queries[h, t].tolist(), keys[h * KV_HEADS // HEADS].tolist(), tokens)

    def selection(self, s: int, length: int) -> set[int]:
        blocks, first_recent = -(-length // P), (length - RECENT) // P
        window = [row + [0.0] * (blocks - len(row)) for row in self.rows[s]]
        window = [[0.0] * blocks for _ in range(H - len(window))] + window
        crop = torch.tensor([row[SINK // P : first_recent] for row in window])
        with torch.no_grad():
            scores = self.network(crop[None])[0].tolist()
        free = BUDGET // P - SINK // P - (RECENT // P + 1)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:free]
        return set(range(SINK // P)) | {i + SINK // P for i in best} | set(range(first_recent, blocks))


@pytest.mark.parametrize("per_query_head", [False, True])
def test_step_equals_the_simulation(per_query_head: bool) -> None:
    torch.manual_seed(0)
    total = PROMPT + STEPS
    queries, keys, values = (
        torch.randn(HEADS, total, DIM),
        torch.randn(KV_HEADS, total, DIM),
        torch.randn(KV_HEADS, total, DIM),
    )
    predictor = Predictor(PredictorConfig(block_size=P, history=H))
    config = CacheConfig(
        budget=BUDGET,
        block_size=P,
        num_sink_tokens=SINK,
        recent_window=RECENT,
        history=H,
        calibration_interval=M,
        per_query_head=per_query_head,
    )
    groups = [[h] for h in range(HEADS)] if per_query_head else [[0, 1], [2, 3]]
    simulation = Simulation(predictor.network, groups)
    decoder, pool = LayerDecoder(config, PaperForecast(predictor), LayerCounts()), BlockPool(P)
    terms = AttentionTerms(SCALE)

    pool.append(keys[None, :, :PROMPT], values[None, :, :PROMPT])
    decoder.observe(queries[None, :, :PROMPT], pool, terms, None, prompt=True)
    simulation.prefill(queries, keys)
    for step in range(1, STEPS + 1):
        t = PROMPT + step - 1
        pool.append(keys[None, :, t : t + 1], values[None, :, t : t + 1])
        wanted = [simulation.selection(s, t + 1) for s in range(len(groups))]
        got = [set(ids) for ids in decoder.pending[1][0].tolist()]
        assert got == wanted, f"step {step}"
        output = decoder.step(queries[None, :, t], pool, terms, None)
        for s, group in enumerate(groups):
            tokens = [i for i in range(t + 1) if i // P in wanted[s]]
            weights = {h: simulation.attend(queries, keys, h, t, tokens) for h in group}
            for h in group:
                expected = sum(w * values[h * KV_HEADS // HEADS, i] for i, w in weights[h].items())
                torch.testing.assert_close(output[0, h], expected, rtol=1e-4, atol=1e-5)
            if step % M == 0:
                weights = {h: simulation.attend(queries, keys, h, t, list(range(t + 1))) for h in group}
            simulation.remember(s, simulation.row_of(group, weights, t + 1))
    assert decoder.counts.sparse_steps == STEPS


def test_counters_are_the_block_arithmetic() -> None:
    torch.manual_seed(0)
    config = CacheConfig(
        budget=BUDGET, block_size=P, num_sink_tokens=SINK, recent_window=RECENT, history=H, calibration_interval=M
    )
    decoder, pool = (
        LayerDecoder(config, PaperForecast(Predictor(PredictorConfig(block_size=P))), LayerCounts()),
        BlockPool(P),
    )
    terms = AttentionTerms(SCALE)
    pool.append(torch.randn(2, KV_HEADS, PROMPT, DIM), torch.randn(2, KV_HEADS, PROMPT, DIM))
    decoder.observe(torch.randn(2, HEADS, PROMPT, DIM), pool, terms, None, prompt=True)
    read = attended = calibration = 0
    for step in range(1, STEPS + 1):
        pool.append(torch.randn(2, KV_HEADS, 1, DIM), torch.randn(2, KV_HEADS, 1, DIM))
        decoder.step(torch.randn(2, HEADS, DIM), pool, terms, None)
        length = PROMPT + step
        blocks = BUDGET // P - (1 if length % P == 0 else 0)
        read += 2 * KV_HEADS * blocks * P * 2 * DIM * 4
        attended += blocks * P - (-length % P)
        calibration += 2 * KV_HEADS * length * DIM * 4 if step % M == 0 else 0
    counts = decoder.counts
    assert (counts.bytes_read, counts.tokens_attended, counts.calibration_bytes) == (read, attended, calibration)
    assert counts.as_dict()["compression"] == counts.full_bytes / (read + calibration)


def test_recovery_of_the_best_selection_is_one_and_of_a_poor_one_less() -> None:
    from attnpred.policies import Oracle, Streaming

    ratios = {}
    for policy in (Oracle(), Streaming()):
        torch.manual_seed(0)
        config = CacheConfig(
            budget=20,
            block_size=P,
            num_sink_tokens=0,
            recent_window=P,
            history=H,
            measure_recovery=True,
            calibration_interval=0,
        )
        decoder, pool = LayerDecoder(config, policy, LayerCounts()), BlockPool(P)
        pool.append(torch.randn(1, 2, 80, DIM), torch.randn(1, 2, 80, DIM))
        decoder.observe(torch.randn(1, 4, 80, DIM), pool, AttentionTerms(2.0), None, prompt=True)
        for _ in range(4):
            pool.append(torch.randn(1, 2, 1, DIM), torch.randn(1, 2, 1, DIM))
            decoder.step(torch.randn(1, 4, DIM), pool, AttentionTerms(2.0), None)
        stats = decoder.counts.as_dict()
        assert 0 < stats["attention_recovery"] <= stats["attention_recovery"] / stats["recovery_ratio"] <= 1.0001
        ratios[type(policy).__name__] = stats["recovery_ratio"]
    assert ratios["Streaming"] < ratios["Oracle"] <= 1.0


def test_history_begins_before_the_context_outgrows_the_budget() -> None:
    config = CacheConfig(budget=64, block_size=P, num_sink_tokens=SINK, recent_window=RECENT, history=H)
    decoder, pool = (
        LayerDecoder(config, PaperForecast(Predictor(PredictorConfig(block_size=P))), LayerCounts()),
        BlockPool(P),
    )
    pool.append(torch.randn(1, 2, 20, DIM), torch.randn(1, 2, 20, DIM))
    decoder.observe(torch.randn(1, 4, 20, DIM), pool, AttentionTerms(1.0), None, prompt=True)
    assert decoder.memory.is_empty
    while decoder.fits(pool.length + 1):
        pool.append(torch.randn(1, 2, 1, DIM), torch.randn(1, 2, 1, DIM))
        decoder.observe(torch.randn(1, 4, 1, DIM), pool, AttentionTerms(1.0), None, prompt=False)
    assert (
        decoder.memory.history.count == H
        and decoder.pending is not None
        and decoder.pending[0].length == pool.length + 1
    )


class Loud:
    """A policy by proxy that notes every call of `score`, each time with other scores."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.scored = inner, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def choose(self, view: Any) -> None:
        return None

    def score(self, view: Any) -> torch.Tensor:
        self.scored.append((view.zone.length, view.is_current))
        return torch.randn(1, KV_HEADS, view.zone.blocks)


@pytest.mark.parametrize("interval", [1, 2, 4])
@pytest.mark.parametrize("policy", [LastStep(), Quest()])
def test_blocks_are_chosen_anew_every_few_steps(interval: int, policy: Policy[Any]) -> None:
    torch.manual_seed(0)
    config = CacheConfig(
        budget=BUDGET, block_size=P, num_sink_tokens=SINK, recent_window=RECENT, selection_interval=interval
    )
    loud, pool, terms = Loud(policy), BlockPool(P), AttentionTerms(SCALE)
    decoder = LayerDecoder(config, loud, LayerCounts())  # type: ignore[arg-type]
    pool.append(torch.randn(1, KV_HEADS, PROMPT, DIM), torch.randn(1, KV_HEADS, PROMPT, DIM))
    decoder.observe(torch.randn(1, HEADS, PROMPT, DIM), pool, terms, None, prompt=True)
    before: set[int] = set()
    for step in range(16):
        pool.append(torch.randn(1, KV_HEADS, 1, DIM), torch.randn(1, KV_HEADS, 1, DIM))
        decoder.step(torch.randn(1, HEADS, DIM), pool, terms, None)
        zone, selection = decoder.attended
        assert selection.shape[2] == zone.sinks + zone.free + zone.blocks - zone.first_recent
        assert {*range(zone.sinks), *range(zone.first_recent, zone.blocks)} <= set(selection[0, 0].tolist())
        middle = set(selection[0, 0, zone.sinks : zone.sinks + zone.free].tolist())
        assert len(middle) == zone.free and (step % interval == 0 or middle == before)
        before = middle
    expected = range(PROMPT + 1, PROMPT + 17, interval)
    is_current = policy.needs_query
    wanted = [(length, is_current) for length in expected] + ([(PROMPT + 17, False)] if not is_current else [])
    assert loud.scored == wanted
