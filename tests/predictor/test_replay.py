"""The replay that a streaming predictor is trained on chooses what the real decode step chooses; its inputs are loops."""

import math

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.digest import FLOOR
from attnpred.policies import Predicted
from attnpred.policies.select import zone_at
from attnpred.predictor.block_truth import block_truth
from attnpred.predictor.digest import Digest
from attnpred.predictor.digest_training import Edges
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from attnpred.predictor.replay import estimates, replay
from attnpred.predictor.streaming import FEATURES
from attnpred.predictor.traces import Vectors
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

LAYERS, KV_HEADS, GROUP, DIM, SCALE = 2, 2, 2, 8, 0.6
PROMPT, STEPS = 5, 17


def vectors(length: int, steps: int = STEPS, seed: int = 0) -> Vectors:
    """Queries that turn slowly, so that the past says something about the next, and keys without order."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(LAYERS, KV_HEADS * GROUP, steps, DIM, generator=generator)
    queries = queries.cumsum(2) / torch.arange(1, steps + 1).sqrt()[:, None]
    keys = torch.randn(LAYERS, KV_HEADS, length, DIM, generator=generator)
    return Vectors((1.5 * queries).half(), keys.half(), length - steps)


def predictor(block_size: int, shared: bool) -> Predictor:
    """Every weight is of some use; one head has a mean per block, the others more vectors."""
    torch.manual_seed(1)
    config = PredictorConfig("streaming", block_size, layers="0 1", heads=KV_HEADS, head_dim=DIM, rank=6)
    made = Predictor(config)
    network = made.streaming
    with torch.no_grad():
        for table in (network.correction, network.forecast):
            table.copy_(torch.rand(1 if shared else LAYERS, 1 if shared else KV_HEADS, FEATURES) + 0.3)
            table[..., -1] *= -1
        for projection in (network.keys, network.queries, network.centre):
            projection.normal_(std=0.5)
        network.vectors.copy_(torch.tensor([[1, block_size], [2, 4]]))
    return made


@pytest.mark.parametrize("correcting", [False, True])
@pytest.mark.parametrize(("block_size", "shared"), [(4, False), (16, False), (4, True)])
def test_a_replay_chooses_what_the_decode_step_chooses(block_size: int, shared: bool, correcting: bool) -> None:
    """Also its features are those of the step's memory, so what is learned from them fits decoding."""
    budgets, sinks, recent = (0.3, 0.5), 1, 2
    document, made = vectors(15 * block_size + 2), predictor(block_size, shared)
    edges = Edges(block_size, sinks, recent, SCALE)
    maps = [made.streaming.digest_map(layer) for layer in range(LAYERS)]
    table = made.streaming.correction if correcting else made.streaming.forecast
    weights = table.detach().flatten(0, 1)[: 1 if shared else None]
    truth = block_truth(document, SCALE, block_size)
    loop = list(replay(truth, estimates(document, maps, edges), edges, weights, budgets, PROMPT, correcting=correcting))
    assert len(loop) == STEPS - PROMPT
    terms, first = AttentionTerms(SCALE), document.first
    for i, budget in enumerate(budgets):
        config = CacheConfig(
            budget=budget,
            block_size=block_size,
            num_sink_tokens=sinks * block_size,
            recent_window=recent * block_size,
            history=PROMPT,
            calibration_interval=0,
            late_share=None if correcting else 0,
            dense_when_fits=False,
        )
        for layer in range(LAYERS):
            rows = slice(layer * KV_HEADS, (layer + 1) * KV_HEADS)
            queries, keys = document.queries[layer][None].float(), document.keys[layer][None].float()
            decoder, pool = LayerDecoder(config, Predicted(made), LayerCounts(), layer), BlockPool(block_size)
            pool.append(keys[:, :, : first + PROMPT], keys[:, :, : first + PROMPT])
            decoder.observe(queries[:, :, :PROMPT], pool, terms, None, prompt=True)
            for number, step in enumerate(loop):
                place = slice(first + PROMPT + number, first + PROMPT + number + 1)
                pool.append(keys[:, :, place], keys[:, :, place])
                zone = zone_at(config, pool.length)
                features = step.features[i, rows]
                assert features.shape == (KV_HEADS, zone.first_recent - sinks, FEATURES)
                if not correcting:
                    torch.testing.assert_close(
                        decoder.memory.features(sinks, zone.first_recent)[0], features, atol=2e-4, rtol=1e-4
                    )
                decoder.step(queries[:, :, PROMPT + number], pool, terms, None)
                scores = (features * weights[rows if not shared else slice(None), None]).sum(-1)
                want = (scores.topk(zone.free, -1).indices + sinks).sort().values
                got = decoder.attended[1][0, :, sinks : sinks + zone.free].sort().values
                assert torch.equal(got, want), f"budget {budget}, layer {layer}, step {number}"


def test_the_history_of_a_replay_is_its_own() -> None:
    """Two budgets look back at different selections; the larger one knows more."""
    document, made = vectors(60), predictor(4, False)
    edges = Edges(4, 1, 2, SCALE)
    maps = [made.streaming.digest_map(layer) for layer in range(LAYERS)]
    arguments = block_truth(document, SCALE, 4), estimates(document, maps, edges), edges
    weights = made.streaming.forecast.detach().flatten(0, 1)
    both = list(replay(*arguments, weights, (0.4, 0.7), PROMPT, correcting=False))
    for i, budget in enumerate((0.4, 0.7)):
        alone = replay(*arguments, weights, (budget,), PROMPT, correcting=False)
        assert all(torch.equal(one.features[0], two.features[i]) for one, two in zip(alone, both, strict=True))
    assert torch.equal(both[0].features[0], both[0].features[1])  # the prompt's rows are those of dense attention
    assert not torch.equal(both[-1].features[0], both[-1].features[1])


@pytest.mark.parametrize("trained", [True, False])
def test_estimates_are_what_a_digest_says_step_by_step(trained: bool) -> None:
    """A digest that is shown the same keys, and asked with each query about the blocks that were full by then."""
    document, edges = vectors(42), Edges(4, 1, 1, SCALE)
    maps = [predictor(4, False).streaming.digest_map(layer) if trained else None for layer in range(LAYERS)]
    found = estimates(document, maps, edges)
    assert found.shape == (STEPS, LAYERS * KV_HEADS, 10)
    for layer in range(LAYERS):
        digest = Digest(4, maps[layer])
        if not trained:
            digest.seal(document.keys[layer][None, :, :40].float())  # the units are those of the keys sealed first
        for step in range(STEPS):
            full = (document.first + step + 1) // 4
            if trained and full > digest.sealed:
                digest.seal(document.keys[layer][None, :, digest.sealed * 4 : full * 4].float())
            query = document.queries[layer][None, :, step].float()
            if trained:
                digest.look(query, SCALE, KV_HEADS)
            else:
                digest.estimate = digest.shares(query, SCALE, KV_HEADS, full)
            own = found[step, layer * KV_HEADS : (layer + 1) * KV_HEADS]
            torch.testing.assert_close(own[:, :full], digest.estimate[0])
            assert (own[:, full:] == FLOOR).all()


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
