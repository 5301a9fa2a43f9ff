"""Budgets that differ between layers and heads, and the union of a group: against loops, and through stock `generate`."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnpred
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies import POLICIES, Oracle, Quest
from attnpred.policies.budgets import FLOOR, counts_for, select_ragged, union_scores
from attnpred.policies.select import select_blocks, zone_at
from tests.hf.support import COVERING, SMALL, greedy
from tests.models import prompt, tiny_model
from tests.policies.layer import CONFIG, Layer, P, Text, chosen, make

SCORES = st.integers(0, 30).map(lambda seed: torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(seed)))
ZONE = zone_at(CacheConfig(budget=14 * P, block_size=P, num_sink_tokens=P, recent_window=2 * P), 40 * P - 1)
CHOOSING = [name for name in POLICIES if not POLICIES[name].is_dense and not POLICIES[name].reads_tokens]


def adaptive_by_hand(scores: Tensor) -> list[set[int]]:
    """[heads, N] of one row: every head its floor, and then the best of all heads, one after the other."""
    middle = range(ZONE.sinks, ZONE.first_recent)
    floor = int(FLOOR * ZONE.free)
    heads = [sorted(middle, key=lambda block: -row[block])[:floor] for row in scores.tolist()]
    taken = {(head, block) for head, blocks in enumerate(heads) for block in blocks}
    others = [(row[block], head, block) for head, row in enumerate(scores.tolist()) for block in middle]
    for _, head, block in sorted(others, reverse=True):
        if len(taken) < ZONE.free * len(scores):
            taken.add((head, block))
    return [{block for own, block in taken if own == head} for head in range(len(scores))]


@given(SCORES)
@settings(max_examples=20, deadline=None)
def test_adaptive_takes_the_best_of_all_heads_above_a_floor(scores: Tensor) -> None:
    counts = counts_for("adaptive", scores, ZONE)
    selection = select_ragged(scores, ZONE, counts)
    edges = {*range(ZONE.sinks), *range(ZONE.first_recent, ZONE.blocks)}
    for row in range(2):
        got = [set(ids) - {-1} for ids in selection[row].tolist()]
        assert got == [edges | blocks for blocks in adaptive_by_hand(scores[row])]
    assert (counts.sum(1) == ZONE.free * 3).all() and (counts >= int(FLOOR * ZONE.free)).all()


@given(SCORES, st.lists(st.floats(0.1, 9), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_weights_share_out_the_budget(scores: Tensor, weights: list[float]) -> None:
    counts = counts_for(tuple(weights), scores, ZONE)
    selection = select_ragged(scores, ZONE, counts)
    for head, weight in enumerate(weights):
        wanted = ZONE.free * 3 * weight / sum(weights)
        assert wanted - 1.001 <= counts[0, head] or counts[0, head] == ZONE.first_recent - ZONE.sinks
        middle = scores[0, head, ZONE.sinks : ZONE.first_recent]
        best = set((middle.topk(int(counts[0, head])).indices + ZONE.sinks).tolist())
        assert set(selection[0, head].tolist()) - {-1} == best | {0, *range(ZONE.first_recent, ZONE.blocks)}


def test_equal_weights_choose_what_is_chosen_without_them() -> None:
    scores = torch.randn(2, 3, 40)
    selection = select_ragged(scores, ZONE, counts_for((2.0, 2.0, 2.0), scores, ZONE))
    assert torch.equal(selection.sort(-1).values, select_blocks(scores, ZONE).sort(-1).values)


def test_left_padding_counts_for_nothing() -> None:
    scores = torch.arange(40.0).flip(0).expand(2, 2, 40)
    first = torch.tensor([0, 20])
    selection = select_ragged(scores, ZONE, counts_for((1.0, 3.0), scores, ZONE), first)
    assert set(selection[1, 0].tolist()) - {-1} == {20, *range(21, 26), *range(ZONE.first_recent, 40)}
    assert min(set(selection[1, 1].tolist()) - {-1}) == 20 and min(selection[0, 1].tolist()) in (-1, 0)


@given(SCORES)
@settings(max_examples=20, deadline=None)
def test_a_union_takes_one_block_of_each_query_head_in_turn(scores: Tensor) -> None:
    heads = torch.cat((scores, scores.flip(-1).roll(3, -1)), 1)  # 6 query heads of 2 kv heads
    got = union_scores(heads, 2)
    for row in range(2):
        for kv in range(2):
            ranks = [
                sorted(range(40), key=lambda b, own=own: -own[b]) for own in heads[row, 3 * kv : 3 * kv + 3].tolist()
            ]
            named = list(dict.fromkeys(block for turn in zip(*ranks, strict=True) for block in turn))
            for size in (3, 9, 21):
                mine = set(got[row, kv].topk(size).indices.tolist())
                whole_turns = {
                    b
                    for i, turn in enumerate(zip(*ranks, strict=True))
                    for b in turn
                    if len({x for t in list(zip(*ranks, strict=True))[: i + 1] for x in t}) <= size
                }
                assert whole_turns <= mine and len(mine) == size <= len(named)


def test_a_union_of_equal_heads_is_what_each_of_them_chooses() -> None:
    scores = torch.randn(1, 1, 40).expand(1, 4, -1)
    assert torch.equal(union_scores(scores, 1).argsort(-1), scores[:, :1].argsort(-1))


@pytest.mark.parametrize("own", [{"union": True}, {"head_budgets": "adaptive"}, {"head_budgets": (1.0, 3.0)}], ids=str)
@pytest.mark.parametrize("name", CHOOSING)
def test_every_policy_keeps_the_budget_of_the_layer(name: str, own: dict[str, Any]) -> None:
    if own.get("union") and POLICIES[name].evicts:
        with pytest.raises(ConfigError, match="got union with a policy that evicts"):
            Layer(make(name), replace(CONFIG, **own))
        return
    config = replace(CONFIG, **own)
    text = Text(150)
    plain, layer = (Layer(make(name), x).prompt(text, 130).steps(text, 130, 148) for x in (CONFIG, config))
    for t, (one, other) in enumerate(zip(plain.blocks, layer.blocks, strict=True), 131):
        assert (other >= 0).sum() <= (one >= 0).sum() or POLICIES[name].leaves_out
        for ids in chosen(other):
            assert {0, (t - 1) // P, (t - 2 * P) // P} <= ids
    is_whole = plain.blocks[-1].shape[2] == -(-148 // P)  # a layer that attends to everything, to choose for others
    if (
        own.get("head_budgets") == (1.0, 3.0)
        and not is_whole
        and not POLICIES[name].keeps_decoded
        and not POLICIES[name].leaves_out
    ):
        sizes = Counter(len(ids) for ids in chosen(layer.blocks[-1]))
        assert len(sizes) == 2, "one kv head chooses more than the other"


@pytest.mark.parametrize("own", [{"union": True}, {"head_budgets": "adaptive"}, {"layer_budgets": (0.5, 1.5)}], ids=str)
@pytest.mark.parametrize("policy", ["quest", "ema", "h2o", "predicted"])
def test_at_the_whole_budget_it_is_stock(policy: str, own: dict[str, Any]) -> None:
    if own.get("union") and policy == "h2o":
        return
    model, tokens = tiny_model("llama"), prompt(2, 90)
    layers = model.config.num_hidden_layers
    own = own if "layer_budgets" not in own else {"layer_budgets": tuple(0.9 + i for i in range(layers))}
    stock = greedy(model, tokens)
    with attnpred.attach(model, policy=make(policy), config=replace(COVERING, **own)):
        assert torch.equal(greedy(model, tokens), stock)


def test_layers_attend_to_what_their_weights_say() -> None:
    model = tiny_model("llama")
    weights = tuple(1.0 + i for i in range(model.config.num_hidden_layers))
    with attnpred.attach(model, policy="quest", config=replace(SMALL, layer_budgets=weights)) as attached:
        greedy(model, prompt(1, 400))
        layers = attached.stats()["layers"]
    for layer, weight in zip(layers, weights, strict=True):
        assert 64 * weight - 12 <= layer["tokens_attended"] <= 64 * weight


def test_a_layer_that_adapts_finds_more_than_one_that_does_not() -> None:
    text = Text(200, seed=3)
    text.keys[:, 0] *= 0.05  # a head without peaks, which needs none of the budget it has

    def found(config: CacheConfig) -> float:
        layer = Layer(Oracle(), config).prompt(text, 180)
        for t in range(180, 199):
            layer.step(text, t)
        return float(layer.decoder.counts.recovery) / layer.decoder.counts.measured

    even = replace(CONFIG, measure_recovery=True)
    assert found(replace(even, head_budgets="adaptive")) > found(even) + 0.01


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"layer_budgets": (1.0, -2.0)}, "expected numbers above 0 and up to 1,000,000, one for each"),
        ({"layer_budgets": "adaptive"}, "expected numbers above 0"),
        ({"head_budgets": "evenly"}, "expected numbers above 0"),
        ({"head_budgets": ()}, "expected numbers above 0"),
        ({"head_budgets": "adaptive", "offload": "cpu"}, "got head_budgets with offload='cpu'"),
        ({"head_budgets": "adaptive", "late_share": 0.1}, "got head_budgets with late_share"),
        ({"union": True, "per_query_head": True}, "got union with per_query_head"),
    ],
)
def test_settings_that_cannot_be(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**own)


@pytest.mark.parametrize("own", [{"layer_budgets": (1.0,)}, {"head_budgets": (1.0,) * 7}], ids=str)
def test_as_many_as_the_model_has(own: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected one for each"):
        attnpred.attach(tiny_model("llama"), policy=Quest(), **own)


@pytest.mark.parametrize("name", CHOOSING)
def test_the_smallest_budget_is_enough_to_go_on(name: str) -> None:
    config = replace(CONFIG, budget=CONFIG.smallest_budget)
    layer = Layer(make(name), config).prompt(Text(150), 130).steps(Text(150), 130, 148)
    assert all(output.isfinite().all() for output in layer.outputs)
