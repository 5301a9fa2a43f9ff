"""A forecast knows nothing of its own step: neither that step's query nor anything later can move it.

Shown with a signal that only a peek would find (a block that the query of one step wants, and no query before), and by
changing everything from that step on. Policies that may look are held to find the signal, so it is there to be found.
"""

import pytest
import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies import POLICIES, Predicted
from attnpred.policies.base import Policy
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.tactic import Tactic
from attnpred.predictor.pretrained import Predictor, PredictorConfig
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

P, DIM, PROMPT, STEPS, WANTED, AT = 4, 8, 93, 8, 9, 4
KV_HEADS, HEADS = 2, 4
LEADERS = [name for name in POLICIES if POLICIES[name].leader is not Policy.leader]  # a layer by itself does not choose
LOOKS = [n for n in POLICIES if (POLICIES[n].needs_query or POLICIES[n].keeps) and n not in LEADERS] + ["corrected"]
EVICTING = [name for name in POLICIES if POLICIES[name].evicts]
FORECASTS = [*(name for name in POLICIES if name not in ("full", "pod", *LOOKS, *LEADERS)), "published"]


def make(name: str) -> tuple[Policy, float | None]:
    """Return the policy and its late_share: "predicted" keeps to its forecast, "corrected" is the same with the query."""
    torch.manual_seed(0)
    if name == "published":
        return PaperForecast(Predictor(PredictorConfig(block_size=P))), None
    if name in ("predicted", "corrected"):
        return Predicted.untrained(P, HEADS // KV_HEADS, DIM), 0 if name == "predicted" else None
    if name == "tactic":  # in a cluster of several blocks one of them may go unnoticed
        return Tactic(cluster_size=P), None
    return POLICIES[name].untrained(P, HEADS // KV_HEADS, DIM), None


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries [Hq, T, D] and keys [Hkv, T, D]: only the query of step `AT` points where block `WANTED` does."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(HEADS, PROMPT + STEPS, DIM, generator=generator)
    keys = torch.randn(KV_HEADS, PROMPT + STEPS, DIM, generator=generator)
    queries[..., 0], keys[..., 0] = -3.0, 0.0
    keys[:, WANTED * P : (WANTED + 1) * P, 0] = 3.0
    queries[:, PROMPT + AT, 0] = 9.0
    return queries, keys


def selections(name: str, queries: Tensor, keys: Tensor, calibration: int = 0) -> list[Tensor]:
    """Return the blocks that each step attended, [Hkv, K], sorted."""
    policy, late_share = make(name)
    config = CacheConfig(
        budget=9 * P,
        block_size=P,
        num_sink_tokens=P,
        recent_window=2 * P,
        history=48,
        calibration_interval=calibration,
        late_share=late_share,
    )
    decoder, pool, terms = LayerDecoder(config, policy, LayerCounts()), BlockPool(P), AttentionTerms(0.5)
    pool.append(keys[None, :, :PROMPT], keys[None, :, :PROMPT])
    decoder.observe(queries[None, :, :PROMPT], pool, terms, None, prompt=True)
    found = []
    for t in range(PROMPT, PROMPT + STEPS):
        pool.append(keys[None, :, t : t + 1], keys[None, :, t : t + 1])
        decoder.step(queries[None, :, t], pool, terms, None)
        found.append(decoder.attended[1][0].sort().values)
    return found


@pytest.mark.parametrize("calibration", [0, 1])
@pytest.mark.parametrize("name", [name for name in FORECASTS if name != "subgen"])  # which keeps keys unlike the others
def test_a_forecast_misses_what_no_query_wanted_before(name: str, calibration: int) -> None:
    found = selections(name, *planted(), calibration)
    assert not any((selection == WANTED).any() for selection in found[: AT + 1])


@pytest.mark.parametrize("name", LOOKS)
def test_a_policy_with_the_query_finds_it(name: str) -> None:
    found = selections(name, *planted())
    assert not any((selection == WANTED).any() for selection in found[:AT])
    assert (found[AT] == WANTED).any(-1).all()


@pytest.mark.parametrize("calibration", [0, 1])
@pytest.mark.parametrize("name", FORECASTS + LOOKS)
def test_nothing_from_a_step_on_moves_its_forecast(name: str, calibration: int) -> None:
    """Query and key of the step and of all later ones are others; only policies that look choose others at the step."""
    queries, keys = planted()
    other_queries, other_keys = queries.clone(), keys.clone()
    other_queries[:, PROMPT + AT :] = 3 * torch.randn(HEADS, STEPS - AT, DIM)
    other_keys[:, PROMPT + AT :] = 3 * torch.randn(KV_HEADS, STEPS - AT, DIM)
    one, other = selections(name, queries, keys, calibration), selections(name, other_queries, other_keys, calibration)
    same = [torch.equal(left, right) for left, right in zip(one, other, strict=True)]
    assert all(same[:AT]) and same[AT] == (name in FORECASTS)
    if calibration and name not in EVICTING:  # which have no true rows, and little left to choose from
        assert not all(same)  # the change is there, and every forecast sees it once it may
