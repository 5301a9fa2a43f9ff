"""What every policy must do, for each in the table; and what defines each of them."""

from typing import Any

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies import POLICIES, Accumulated, Ema, LastStep, MeanKey, Oracle, Quest, Streaming
from attnpred.policies.base import Policy, View
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.select import select_blocks, zone_at
from attnpred.predictor.pretrained import Predictor, PredictorConfig

CONFIG = CacheConfig(budget=64, block_size=4, num_sink_tokens=4, recent_window=8, history=8)
HEADS, KV_HEADS, DIM = 6, 3, 8


def make(name: str) -> Policy[Any]:
    torch.manual_seed(0)
    return POLICIES[name].untrained(CONFIG.block_size, HEADS // KV_HEADS, DIM)


def view(policy: Policy[Any], rows: torch.Tensor, length: int, keys: torch.Tensor | None = None) -> View[Any]:
    """Feed a memory as a decode step would, with `rows` [B, Hs, R, N]; the last query is all ones."""
    memory = policy.memory(CONFIG, 0)
    batch, heads = rows.shape[:2]
    if keys is None:
        keys = torch.randn(batch, heads, length, DIM, generator=torch.Generator().manual_seed(3))
    if memory.sealed == 0:
        memory.seal(keys[:, :, : length // 4 * 4])
    if memory.rows:
        memory.push(rows[:, :, -memory.rows :])
    memory.look(torch.ones(batch, 2 * heads, DIM), 0.5, heads)
    mass = torch.rand(batch, heads, -(-length // 4), generator=torch.Generator().manual_seed(7))
    logits = torch.randn(batch, 2 * heads, 999, generator=torch.Generator().manual_seed(8))
    return View(memory, zone_at(CONFIG, length), 0, True, lambda: mass, lambda ids: logits[..., : ids.shape[2]])


@pytest.mark.parametrize("name", [n for n in POLICIES if not POLICIES[n].is_dense])
def test_scores_have_one_finite_value_for_every_block_even_of_a_block_just_opened(name: str) -> None:
    policy = make(name)
    for length in (100, 101, 104, 105):
        shown = view(policy, torch.rand(2, 3, 9, 25), length)
        scores = policy.score(shown).expand(2, 3, -1)
        assert scores.shape == (2, 3, shown.zone.blocks) and not scores.isnan().any()
        assert scores.isfinite().all() or policy.leaves_out
        assert select_blocks(scores, shown.zone).shape[2] <= CONFIG.budget_blocks(length)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_frozen_final_and_documented(name: str) -> None:
    policy = make(name)
    assert type(policy).__dataclass_params__.frozen
    assert type(policy).__final__ and type(policy).__doc__ and __import__(type(policy).__module__, fromlist="x").__doc__


@pytest.mark.parametrize("name", [n for n in POLICIES if not POLICIES[n].is_dense])
def test_a_memory_does_not_change_what_it_is_shown(name: str) -> None:
    rows, keys = torch.rand(1, 3, 9, 25), torch.randn(1, 3, 100, DIM)
    shown = rows.clone(), keys.clone()
    view(make(name), rows, 100, keys)
    assert torch.equal(rows, shown[0]) and torch.equal(keys, shown[1])


def chosen(policy: Policy[Any], rows: torch.Tensor, length: int = 100, keys: torch.Tensor | None = None) -> set[int]:
    shown = view(policy, rows, length, keys)
    return set(select_blocks(policy.score(shown).expand(1, 1, -1), shown.zone)[0, 0].tolist())


def test_streaming_keeps_sinks_and_the_newest() -> None:
    assert chosen(Streaming(), torch.rand(1, 1, 3, 25)) == {0} | set(range(11, 25))


def test_last_step_repeats_the_last_row() -> None:
    rows = torch.zeros(1, 1, 3, 25)
    rows[..., 0, 3], rows[..., 2, 9] = 1.0, 0.5
    assert LastStep().score(view(LastStep(), rows, 100)).argmax() == 9


def test_ema_weighs_rows_by_their_age() -> None:
    rows = torch.rand(1, 1, 4, 25)
    want = rows[:, :, 0]
    for i in range(1, 4):
        want = 0.75 * want + 0.25 * rows[:, :, i]
    torch.testing.assert_close(Ema(0.25).score(view(Ema(0.25), rows, 100)), want)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_ema_refuses_a_bad_rate(rate: float) -> None:
    with pytest.raises(ConfigError, match="expected above 0 and up to 1"):
        Ema(rate)


def test_accumulated_adds_up_all_rows() -> None:
    rows = torch.rand(1, 1, 4, 25)
    torch.testing.assert_close(Accumulated().score(view(Accumulated(), rows, 100)), rows.sum(2))


def softmax_over_blocks(logits: torch.Tensor) -> torch.Tensor:
    """[Hq, N] of one kv head to the score of the group, with loops."""
    return sum(torch.softmax(row, -1) for row in logits).log().clamp_min(-14)


def test_quest_scores_by_the_bound_that_minimum_and_maximum_allow() -> None:
    keys, query = torch.randn(1, 1, 100, DIM), torch.ones(DIM)
    shown = view(Quest(), torch.rand(1, 1, 1, 25), 100, keys)
    bound = torch.tensor([
        sum(max(float(q * block[:, d].min()), float(q * block[:, d].max())) for d, q in enumerate(query)) * 0.5
        for block in keys[0, 0].view(25, 4, DIM)
    ])  # fmt: skip
    torch.testing.assert_close(Quest().score(shown)[0, 0], softmax_over_blocks(torch.stack((bound, bound))))
    exact = (keys[0, 0].view(25, 4, DIM) @ query).amax(-1) * 0.5
    assert (bound >= exact - 1e-5).all()


def test_mean_key_scores_by_the_mean_of_a_block() -> None:
    keys = torch.randn(1, 1, 100, DIM)
    shown = view(MeanKey(), torch.rand(1, 1, 1, 25), 100, keys)
    logits = keys[0, 0].view(25, 4, DIM).mean(1).sum(-1) * 0.5
    torch.testing.assert_close(MeanKey().score(shown)[0, 0], softmax_over_blocks(torch.stack((logits, logits))))


def test_oracle_takes_the_true_mass() -> None:
    shown = view(Oracle(), torch.rand(2, 3, 1, 25), 100)
    assert torch.equal(Oracle().score(shown), shown.block_mass())


def test_the_published_network_sees_only_the_blocks_between_sinks_and_recent_window() -> None:
    torch.manual_seed(0)
    policy = PaperForecast(Predictor(PredictorConfig(block_size=4)))
    rows = torch.rand(1, 2, 8, 25)
    scores = policy.score(view(policy, rows, 100))
    with torch.no_grad():
        want = policy.predictor(rows[..., 1:23])
    torch.testing.assert_close(scores[..., 1:23], want, atol=1e-5, rtol=1e-5)
    assert scores[..., :1].abs().sum() == 0 and scores[..., 23:].abs().sum() == 0
