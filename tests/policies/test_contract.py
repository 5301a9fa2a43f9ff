"""What every policy must do, for each in the table; and what defines each of them."""

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies import POLICIES, Ema, Oracle, Predicted, Streaming
from attnpred.policies.base import Policy, View
from attnpred.policies.select import select_blocks, zone_at
from attnpred.predictor.history import History
from attnpred.predictor.pretrained import Predictor, PredictorConfig

CONFIG = CacheConfig(budget=64, block_size=4, num_sink_tokens=4, recent_window=8)


def make(name: str) -> Policy:
    torch.manual_seed(0)
    return Predicted(Predictor(PredictorConfig(block_size=4))) if name == "predicted" else POLICIES[name]()


def view(policy: Policy, rows: torch.Tensor, length: int) -> View:
    history = History(max(1, policy.state_rows(8)))
    if policy.state_rows(8):
        policy.push(history, rows)
    mass = torch.rand(rows.shape[0], rows.shape[1], -(-length // 4), generator=torch.Generator().manual_seed(7))
    return View(history, zone_at(CONFIG, length), lambda: mass)


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "full"])
def test_scores_have_one_finite_value_for_every_block_even_of_a_block_just_opened(name: str) -> None:
    policy = make(name)
    for length in (100, 101, 104, 105):
        shown = view(policy, torch.rand(2, 3, 9, 25), length)
        scores = policy.score(shown).expand(2, 3, -1)
        assert scores.shape == (2, 3, shown.zone.blocks) and scores.isfinite().all()
        assert select_blocks(scores, shown.zone).shape[2] <= CONFIG.budget_blocks(length)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_frozen_final_and_documented(name: str) -> None:
    policy = make(name)
    assert type(policy).__dataclass_params__.frozen
    assert type(policy).__final__ and type(policy).__doc__ and __import__(type(policy).__module__, fromlist="x").__doc__


def chosen(policy: Policy, rows: torch.Tensor, length: int = 100) -> set[int]:
    shown = view(policy, rows, length)
    return set(select_blocks(policy.score(shown).expand(1, 1, -1), shown.zone)[0, 0].tolist())


def test_streaming_keeps_sinks_and_the_newest() -> None:
    assert chosen(Streaming(), torch.rand(1, 1, 3, 25)) == {0} | set(range(11, 25))


def test_last_step_repeats_the_last_row() -> None:
    rows = torch.zeros(1, 1, 3, 25)
    rows[..., 0, 3], rows[..., 2, 9] = 1.0, 0.5
    shown = view(POLICIES["last_step"](), rows, 100)
    assert shown.history.last().argmax() == 9 and shown.history.count == 1


def test_ema_weighs_rows_by_their_age() -> None:
    rows = torch.rand(1, 1, 4, 25)
    shown = view(Ema(0.25), rows, 100)
    want = rows[:, :, 0]
    for i in range(1, 4):
        want = 0.75 * want + 0.25 * rows[:, :, i]
    torch.testing.assert_close(Ema(0.25).score(shown), want)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5, float("nan")])
def test_ema_refuses_a_bad_rate(rate: float) -> None:
    with pytest.raises(ConfigError, match="expected above 0 and up to 1"):
        Ema(rate)


def test_oracle_takes_the_true_mass() -> None:
    shown = view(Oracle(), torch.rand(2, 3, 1, 25), 100)
    assert torch.equal(Oracle().score(shown), shown.block_mass())


def test_predicted_shows_the_network_only_the_blocks_between_sinks_and_recent_window() -> None:
    policy = make("predicted")
    rows = torch.rand(1, 2, 8, 25)
    shown = view(policy, rows, 100)
    scores = policy.score(shown)
    with torch.no_grad():
        want = policy.predictor(rows[..., 1:23])
    torch.testing.assert_close(scores[..., 1:23], want)
    assert scores[..., :1].abs().sum() == 0 and scores[..., 23:].abs().sum() == 0
