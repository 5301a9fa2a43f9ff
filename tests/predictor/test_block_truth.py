"""What a captured document says about its blocks, against loops over its tokens; and what a query has to choose from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.config import CacheConfig
from attnpred.policies.select import zone_at
from attnpred.predictor.block_truth import block_truth
from attnpred.predictor.edges import Edges
from attnpred.predictor.traces import Vectors

LAYERS, KV_HEADS, GROUP, DIM, SCALE = 2, 2, 2, 8, 0.6


def vectors(length: int, steps: int, seed: int = 0) -> Vectors:
    """Queries that turn slowly, so that the past says something about the next, and keys without order."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(LAYERS, KV_HEADS * GROUP, steps, DIM, generator=generator)
    queries = queries.cumsum(2) / torch.arange(1, steps + 1).sqrt()[:, None]
    keys = torch.randn(LAYERS, KV_HEADS, length, DIM, generator=generator)
    return Vectors((1.5 * queries).half(), keys.half(), length - steps)


def test_the_truth_about_blocks_is_a_loop_over_tokens() -> None:
    """The last block is not full, and to each query the blocks after it do not exist."""
    document = vectors(14, steps=6)
    truth = block_truth(document, SCALE, 4)
    assert truth.largest.shape == truth.total.shape == (LAYERS * KV_HEADS, GROUP, 6, 4) and truth.first == 8
    for row in range(LAYERS * KV_HEADS):
        layer, head = divmod(row, KV_HEADS)
        keys = document.keys[layer, head].float()
        for step in range(6):
            mass = [0.0] * 4
            for member in range(GROUP):
                query = document.queries[layer, head * GROUP + member, step].float()
                logits = [SCALE * float(query @ keys[token]) for token in range(8 + step + 1)]
                whole = sum(math.exp(logit) for logit in logits)
                for block in range(4):
                    inside = logits[4 * block : 4 * block + 4]
                    largest, total = truth.largest[row, member, step, block], truth.total[row, member, step, block]
                    if not inside:
                        assert largest < -9000 and total < -9000
                        continue
                    assert float(largest) == pytest.approx(max(inside), abs=1e-4)
                    assert float(total) == pytest.approx(math.log(sum(map(math.exp, inside))), abs=1e-4)
                    mass[block] += sum(map(math.exp, inside)) / whole
            assert truth.mass[row, step].tolist() == pytest.approx(mass, abs=1e-5)
    assert truth.mass[:, 0, 3].eq(0).all() and truth.mass[:, 4, 3].gt(0).all()


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
