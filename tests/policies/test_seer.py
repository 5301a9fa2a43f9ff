"""SeerAttention-R's gate as a policy: it chooses by the gate, and is found, saved and refused by name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import attnpred
from attnpred.config import CacheConfig
from attnpred.errors import ConfigError, PredictorError
from attnpred.hf import DEMO_MODEL, TieredCache, load_model, make_policy
from attnpred.policies import Seer
from attnpred.policies.predicted import Predicted
from attnpred.predictor.pretrained import Predictor, PredictorConfig, shipped
from attnpred.store.pool import BlockPool
from tests.models import tiny_model
from tests.policies.layer import CONFIG, DIM, GROUP, KV_HEADS, Layer, P, Text, best, chosen

PROMPT, STEPS, RANK = 101, 9, 5


def trained(seed: int = 0) -> Seer:
    """Return a gate with random weights of each head's own, for layers 0 and 5."""
    sizes: dict[str, Any] = {"layers": "0 5", "heads": KV_HEADS, "group": GROUP, "head_dim": DIM, "rank": RANK}
    made = Predictor(PredictorConfig("seer-gate", P, **sizes))
    with torch.no_grad():
        for parameter in made.gate.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return Seer(made)


def scores(policy: Seer, place: int, text: Text, head: int, t: int) -> list[float]:
    """Return the gate's logits of all blocks that are full when token `t` is decoded, block by block."""
    gate = policy.predictor.gate.gate_map(place)
    queries, keys = gate.queries[head], gate.keys[head]
    query = torch.cat([text.queries[0, head * GROUP + g, t] for g in range(GROUP)]) @ queries
    found = []
    for block in range((t + 1) // P):
        tokens = [text.keys[0, head, block * P + i] for i in range(P)]
        largest, smallest = tokens[0], tokens[0]
        for token in tokens[1:]:
            largest, smallest = torch.maximum(largest, token), torch.minimum(smallest, token)
        pools = torch.cat((largest, smallest, sum(tokens) / P))
        found.append(float(query @ (pools @ keys)) / math.sqrt(RANK))
    return found


@pytest.mark.parametrize(("layer", "place"), [(0, 0), (5, 1)])
def test_against_a_loop(layer: int, place: int) -> None:
    text, policy = Text(PROMPT + STEPS), trained()
    run = Layer(policy, CONFIG, layer).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    for step, selection in enumerate(run.blocks):
        t = PROMPT + step
        for head, ids in enumerate(chosen(selection)):
            own = scores(policy, place, text, head, t)
            assert ids == best(own + [0.0] * (-(-(t + 1) // P) - len(own)), t + 1)


def test_every_step_chooses_anew_from_its_own_query_and_reads_gate_keys_alone() -> None:
    text, policy = Text(PROMPT + STEPS), trained()
    run = Layer(policy).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    assert run.decoder.pending is None  # nothing is chosen ahead
    steps = [-(-(PROMPT + step + 1) // P) - (1 if (PROMPT + step + 1) % P else 0) for step in range(STEPS)]
    assert run.decoder.counts.digest_bytes == sum(full * KV_HEADS * RANK * 4 for full in steps)
    assert run.decoder.counts.calibration_bytes == 0 and isinstance(run.pool, BlockPool)
    other = Text(PROMPT + STEPS)
    other.queries[:, :, PROMPT + 3] = 3 * torch.randn(other.queries[:, :, 0].shape)
    again = Layer(policy).prompt(other, PROMPT).steps(other, PROMPT, PROMPT + STEPS)
    same = [chosen(one) == chosen(two) for one, two in zip(run.blocks, again.blocks, strict=True)]
    assert same == [step != 3 for step in range(STEPS)]


def test_a_layer_without_a_gate_is_refused() -> None:
    with pytest.raises(PredictorError, match=r"got no weights for layer 1, expected layers \[0, 5\]"):
        Layer(trained(), CONFIG, 1)


def test_by_name_it_is_the_shipped_gate_of_the_model() -> None:
    policy = make_policy("seer", None, AutoConfig.from_pretrained(DEMO_MODEL), CacheConfig())
    assert isinstance(policy, Seer)
    assert policy.predictor.config == Predictor.from_pretrained(shipped()["seer-demo"]).config


def test_a_model_without_a_gate_is_told_how_to_make_one() -> None:
    with pytest.raises(ConfigError) as caught:
        attnpred.attach(tiny_model("llama"), policy="seer")
    said = str(caught.value)
    assert said.startswith(
        "got policy 'seer' for llama (llama-3-32-4-97), expected a seer-gate predictor for it, and none is"
    )
    assert (
        said.endswith("(attnpred capture, attnpred train --predictor seer-gate) and pass predictor=")
        and "\n" not in said
    )


def test_a_predictor_of_another_kind_is_refused() -> None:
    config = AutoConfig.from_pretrained(DEMO_MODEL)
    for policy, predictor, got, wanted in (
        ("seer", "attention-predictor-cnn", "cnn", "seer-gate"),
        ("predicted", "seer-demo", "seer-gate", "cnn"),
    ):
        with pytest.raises(
            ConfigError, match=f"got a predictor of kind '{got}' for policy '{policy}', expected '{wanted}'"
        ):
            make_policy(policy, predictor, config, CacheConfig())
    assert isinstance(make_policy("predicted", None, config, CacheConfig()), Predicted)
    with pytest.raises(PredictorError, match="got a predictor for blocks of 16, expected 32"):
        make_policy("seer", "seer-demo", config, CacheConfig(block_size=32, num_sink_tokens=32))


@torch.no_grad()
def test_a_cache_of_the_demo_model_is_saved_and_found_again(tmp_path: Path) -> None:
    """Stock calls of the model, by name; a saved cache finds the shipped gate by its weights."""
    model, _ = load_model("demo")
    tokens = torch.randint(10, 4000, (1, 420), generator=torch.Generator().manual_seed(0))
    with attnpred.attach(model, policy="seer", budget=192, dense_layers=0) as attached:
        cache = attached.new_cache()
        model(tokens[:, :-2], cache=cache)
        model(tokens[:, -2:-1], cache=cache)
        cache.save(tmp_path / "a.kv")
        loaded = TieredCache.load(tmp_path / "a.kv", model)
        assert isinstance(loaded.policy, Seer)
        one, other = (model(tokens[:, -1:], cache=each).logits for each in (cache, loaded))
        assert torch.equal(one, other)
        assert cache.stats()["total"]["sparse_steps"] == loaded.stats()["total"]["sparse_steps"] + 5 > 5
