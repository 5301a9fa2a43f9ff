"""A real model from the package index: it loads, it says what llama.cpp says, and the library's promises hold on it."""

from typing import Any

import pytest
import torch

import attnpred
from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.session import PolicySession
from attnpred.evaluation.tasks import TASKS, Wanted
from attnpred.evaluation.variants import parse_variant
from attnpred.hf import load_model
from attnpred.hf.fetch import fetch_gguf, fetch_model
from tests.gguf_files import sha256
from tools import llama_logits

pytestmark = [pytest.mark.real, pytest.mark.slow]

THIRTEENTH = CacheConfig(budget=1 / 13, num_sink_tokens=16, recent_window=32, dense_layers=0)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_model("smollm2", device="cpu", dtype=torch.float32)


def generated(model: Any, ids: Any, new: int) -> list[int]:
    out = model.generate(**ids, max_new_tokens=new, do_sample=False)
    return out[0, ids["input_ids"].shape[1] :].tolist()


def test_the_file_is_the_pinned_one_and_its_folder_serves_too(smollm2: tuple[Any, Any]) -> None:
    assert sha256(fetch_gguf("smollm2")).startswith("b179c952")
    assert smollm2[0].config._name_or_path == str(fetch_model("smollm2"))
    assert smollm2[0].config.max_position_embeddings == 8192


def test_it_answers_in_its_chat_template(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "Paris" in tokenizer.decode(generated(model, ids, 16))


@pytest.mark.parametrize("policy", ["predicted", "quest", "snapkv"])
def test_a_budget_that_holds_everything_changes_no_token(policy: str, smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(demo_book()[5000:7000], return_tensors="pt", verbose=False)
    stock = generated(model, ids, 24)
    with attnpred.attach(model, policy=policy, budget=1024):
        assert generated(model, ids, 24) == stock
    assert generated(model, ids, 24) == stock


def test_it_finds_a_pass_key_with_a_thirteenth_of_the_cache(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    task = TASKS["passkey"]()
    example = task.examples(tokenizer, Wanted(length=1500, count=2, seed=5))[1]
    for word in ("full", "predicted"):
        policy, settings = parse_variant(word).make(model.config, THIRTEENTH)
        with PolicySession(model, tokenizer, policy, settings) as session:
            assert [item.value for item in task.run(session, example)] == [1.0], word
            read = session.costs()["tokens_attended"]
        assert read < 200 if word == "predicted" else read > 1400


def test_its_next_token_is_that_of_llama_cpp(record_property: Any) -> None:
    pytest.importorskip("xllamacpp")
    found = llama_logits.measure()["stored"]
    record_property("agreement", str(found))
    print(found)
    assert found.prompts == 50 and found.same + found.near_ties == 50
    assert found.same >= 45 and found.difference < 0.15
