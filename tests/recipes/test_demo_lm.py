"""The recipe's own model is transformers' Qwen2, its start can copy, and its samples ask only what can be known."""

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from attnpred.evaluation.book import demo_book
from attnpred.hf import DEMO_MODEL
from recipes.demo_lm import model, train
from recipes.demo_lm.samples import ANSWER, Sampler


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    tokens = np.asarray(tokenizer.encode(demo_book()[:60_000]).ids, dtype=np.uint16)
    return Sampler(tokens, tokenizer, random.Random(0))


def test_training_function_equals_transformers() -> None:
    shape = model.Shape(vocab=200, layers=2)
    params = model.init(shape, seed=1)
    config = Qwen2Config(
        vocab_size=200,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=2,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
    )
    library = Qwen2ForCausalLM(config).eval()
    missing = library.load_state_dict({k: v.detach() for k, v in params.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    library.tie_weights()
    tokens = torch.randint(0, 200, (2, 40))
    with torch.no_grad():
        ours = model.logits(params, shape, tokens, torch.arange(40).expand(2, -1).float()).float()
        theirs = library(tokens).logits
    assert (ours - theirs).norm() / theirs.norm() < 0.03


def test_the_start_already_copies_what_followed_an_earlier_occurrence() -> None:
    shape = model.Shape()
    params = model.init(shape)
    passage = torch.randint(1, shape.vocab, (1, 150), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat((passage, passage), 1)
    with torch.no_grad():
        logits = model.logits(params, shape, tokens, torch.arange(300)[None].float()).float()[0]
    ranks = [int((logits[i] > logits[i, tokens[0, i + 1]]).sum()) for i in range(160, 299)]
    first = [int((logits[i] > logits[i, tokens[0, i + 1]]).sum()) for i in range(10, 149)]
    assert np.median(ranks) < 50 < 1000 < np.median(first)


@pytest.mark.parametrize("kind", ["book", "dense", "restated", "planted", "repeat"])
def test_samples_have_the_asked_length(sampler: Sampler, kind: str) -> None:
    for length in (128, 512):
        ids, weights = sampler.draw(kind, length, 100)
        assert len(ids) == len(weights) == length + 1 and min(weights) >= 0


@pytest.mark.parametrize("kind", ["dense", "restated", "planted"])
def test_answers_that_carry_weight_stand_in_the_text_before(sampler: Sampler, kind: str) -> None:
    ids, weights = sampler.draw(kind, 512, 100)
    places = [i for i, weight in enumerate(weights) if weight == ANSWER]
    starts = [i for i in places if i - 1 not in places and i + 4 <= len(ids)]
    assert starts
    for i in starts:
        lead = ids[i - 2 : i + 4]
        assert any(ids[j : j + 6] == lead for j in range(i - 3))


def test_positions_grow_and_stay_below_the_limit(sampler: Sampler) -> None:
    jumps = 0
    for _ in range(50):
        positions = sampler.positions(128, 8192)
        assert positions[0] == 0 and (np.diff(positions) >= 1).all() and positions[-1] < 8192
        jumps += int((np.diff(positions) > 1).any())
    assert 10 < jumps < 45


def test_schedule_warms_up_and_ends_low() -> None:
    rates = [train.learning_rate(done) for done in range(0, train.TOTAL, train.TOTAL // 200)]
    assert max(rates) == train.PEAK and rates[0] < train.PEAK / 10 and rates[-1] < train.PEAK / 10
    assert train.stage_at(0).length == 128 and train.stage_at(train.TOTAL - 1).length == 4096
