"""Tactic: each head attends to as many blocks as a share of its attention needs, by an estimate from few of them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.select import zone_at
from attnpred.policies.tactic import FAR, HEAD, NEAR, WIDTH, Tactic
from attnpred.predictor.clusters import Clusters, k_means
from tests.policies.layer import CONFIG, DIM, GROUP, HEADS, KV_HEADS, SCALE, Layer, P, Text, chosen, kept
from tests.policies.test_recycled import attention

PROMPT, STEPS = 141, 6
WIDE = replace(CONFIG, budget=30 * P)


def block_mass(text: Text, h: int, t: int) -> dict[int, float]:
    mass: dict[int, float] = {}
    for token, weight in attention(text, h, t, None)[0].items():
        mass[token // P] = mass.get(token // P, 0.0) + weight
    return mass


def wanted_by(text: Text, h: int, t: int, memory: Clusters, config: CacheConfig, mass: float) -> dict[int, float]:
    """Return the blocks that query head `h` wants at `t`, and their estimated shares, from the description."""
    zone, head = zone_at(config, t + 1), h // GROUP
    true = block_mass(text, h, t)
    middle = range(zone.sinks, min(memory.count, zone.first_recent))

    def logit(block: int) -> float:
        if memory.per_cluster == 1:
            key = text.keys[0, head, block * P : block * P + P].mean(0)
        else:
            key = memory.centroids[0, head, memory.places.view()[0, head, block]]
        return float(text.queries[0, h, t] @ key)

    order = sorted(middle, key=lambda block: (-round(logit(block), 4), block))
    number, width = len(order), max(1, round(WIDTH * len(order)))
    samples = [set(range(int(share * number), int(share * number) + width)) for share in (NEAR, FAR)]
    exact = set(range(max(memory.per_cluster, math.ceil(HEAD * number)))) | samples[0] | samples[1]
    points = []
    for sample in ({r for r in exact if int(NEAR * number) <= r < int(FAR * number)}, samples[1]):
        points.append(
            (sum(1 / (r + 1) for r in sample) / len(sample), sum(true[order[r]] for r in sample) / len(sample))
        )
    a = (points[0][1] - points[1][1]) / (points[0][0] - points[1][0])
    b = points[1][1] - a * points[1][0]
    estimate = [true[order[r]] if r in exact else max(0.0, a / (r + 1) + b) for r in range(number)]
    held = sum(weight for block, weight in true.items() if block not in middle)
    total, found = held + sum(estimate), {}
    for block, share in zip(order, estimate, strict=True):
        if held >= mass * total:
            break
        found[block], held = share / total, held + share
    return found


@pytest.mark.parametrize("cluster_size", [P, 3 * P])
@pytest.mark.parametrize("config", [WIDE, CONFIG], ids=["wide", "narrow"])
def test_against_a_loop(config: CacheConfig, cluster_size: int) -> None:
    text, policy = Text(PROMPT + STEPS), Tactic(0.7, cluster_size)
    layer, cut = Layer(policy, config).prompt(text, PROMPT), 0
    for t in range(PROMPT, PROMPT + STEPS):
        layer.step(text, t)
        for head in range(KV_HEADS):
            shares: dict[int, float] = {}
            for h in range(head * GROUP, (head + 1) * GROUP):
                for block, share in wanted_by(text, h, t, layer.decoder.memory, config, 0.7).items():
                    shares[block] = max(shares.get(block, 0.0), share)
            # those that became full since the prompt are fresh, and still recent
            best = sorted(shares, key=lambda block: -shares[block])[: zone_at(config, t + 1).free]
            cut += len(shares) > len(best)
            assert chosen(layer.blocks[-1])[head] == set(best) | kept(t + 1)
    assert cut > 0 or config is WIDE


def falling(number: int, stair: int) -> Text:
    """A query that puts 1 / rank + 0.0001 on the tokens, in random order; `stair` ranks are the same key."""
    text = Text(number + 9)
    ranks = torch.randperm(number, generator=torch.Generator().manual_seed(1)) // stair * stair + 1
    text.queries[:], text.keys[:] = 0.0, 0.0
    text.queries[..., 0] = 1 / SCALE
    text.keys[..., 0] = math.log(1e-4)
    text.keys[0, :, :number, 0] = torch.log(1 / ranks + 1e-4)
    return text


@pytest.mark.parametrize("stair", [1, 8])
@pytest.mark.parametrize("mass", [0.5, 0.75, 0.9])
def test_the_selection_reaches_the_share_where_attention_falls_as_assumed(mass: float, stair: int) -> None:
    """Tokens, as published, and a budget that allows it. Nearly exact where the curve is."""
    number = 1200
    config = CacheConfig(
        budget=1190, block_size=1, num_sink_tokens=4, recent_window=8, history=4, calibration_interval=0
    )
    text = falling(number, stair)
    layer = Layer(Tactic(mass, stair), config).prompt(text, number).step(text, number)
    for head, blocks in enumerate(chosen(layer.blocks[-1])):
        weights = attention_of_tokens(text, head * GROUP, number)
        reached = sum(weights[token] for token in blocks)
        weakest = min(weights[token] for token in blocks if 4 <= token < number - 8)
        assert mass - (0.002 if stair == 1 else 0.03) < reached < mass + weakest + (0.002 if stair == 1 else 0.03)
        assert stair > 1 or weakest > sorted(weights, reverse=True)[len(blocks)]  # the best, and no more
        assert len(blocks) < number // 2
    assert (layer.blocks[-1] < 0).any()


def attention_of_tokens(text: Text, h: int, t: int) -> list[float]:
    logits = text.keys[0, h // GROUP, : t + 1] @ text.queries[0, h, t] * SCALE
    weights: list[float] = torch.softmax(logits, -1).tolist()
    return weights


def test_heads_differ_in_size_and_only_what_is_attended_is_counted() -> None:
    text = Text(PROMPT + 1)
    text.queries[:, :GROUP] *= 4.0  # the first kv head is sharp, the second is not
    text.queries[:, GROUP:] *= 0.1
    layer = Layer(Tactic(0.6), WIDE).prompt(text, PROMPT).step(text, PROMPT)
    sharp, flat = (len(blocks) for blocks in chosen(layer.blocks[-1]))
    assert sharp < flat
    counts = layer.decoder.counts
    assert counts.bytes_read == (sharp + flat) * P * 2 * DIM * 4
    assert counts.calibration_bytes == HEADS * probed(PROMPT + 1, 4) * P * DIM * 4


def probed(length: int, per_cluster: int) -> int:
    """Return how many blocks each query head measures: what is kept anyway, and the ranks."""
    zone = zone_at(WIDE, length)
    number = zone.first_recent - zone.sinks
    ranks = set(range(max(per_cluster, math.ceil(HEAD * number)))) | {int(NEAR * number), int(FAR * number)}
    return len(kept(length)) + len(ranks)


def test_fresh_blocks_come_first_until_they_are_clustered() -> None:
    text = Text(PROMPT + 60)
    layer = Layer(Tactic(0.3, again=40), WIDE).prompt(text, PROMPT)
    counts = set()
    for t in range(PROMPT, PROMPT + 60):
        memory = layer.step(text, t).decoder.memory
        counts.add(memory.count)
        zone = zone_at(WIDE, t + 1)
        assert set(range(memory.count, zone.first_recent)) <= set.intersection(*chosen(layer.blocks[-1]))
    assert counts == {35, 45}
    assert memory.centroids.shape[2] == 9 + 3 and int(memory.places.view().max()) == 11


def test_k_means_against_a_loop() -> None:
    points = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    centroids, places = k_means(points, 4, 6)
    start = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:4].sort().values.tolist()
    for row in range(2):
        means: list[Tensor] = [points[row, i] for i in start]
        for _ in range(6):
            found = [min(range(4), key=lambda c: float((x - means[c]).square().sum())) for x in points[row]]
            for c in range(4):
                own = [points[row, i] for i in range(30) if found[i] == c]
                means[c] = torch.stack(own).mean(0) if own else means[c]
        torch.testing.assert_close(centroids[row], torch.stack(means))
        nearest = [min(range(4), key=lambda c: float((x - means[c]).square().sum())) for x in points[row]]
        assert places[row].tolist() == nearest


def test_after_a_crop_the_rest_is_clustered_anew() -> None:
    text = Text(PROMPT + STEPS)
    layer = Layer(Tactic(), WIDE).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    layer.pool.crop(100)
    layer.decoder.crop(100)
    layer.step(text, 100)
    fresh = Layer(Tactic(), WIDE).prompt(text, 100).step(text, 100)
    memory, other = layer.decoder.memory, fresh.decoder.memory
    assert memory.count == other.count == 25 and torch.equal(memory.centroids, other.centroids)
    assert torch.equal(memory.places.view(), other.places.view())
    assert chosen(layer.blocks[-1]) == chosen(fresh.blocks[-1])


WRONG = [
    {"mass": 0},
    {"mass": 1.1},
    {"mass": True},
    {"cluster_size": 0},
    {"rounds": 1.5},
    {"rounds": 10**12},
    {"again": False},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_setting_is_one_line(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"got {next(iter(wrong))}=") as caught:
        Tactic(**wrong)
    assert "\n" not in str(caught.value)
