"""What stock `generate` can do gives the same tokens with an attached model that has the budget for it.

Every feature runs with stock generate, then attached: dense (the budget holds everything), and with the sparse path
forced over everything, once with a policy of one row of history and once with a predictor over many, so that masks,
beams, crops and histories must stay consistent. Below the budget, padded rows are held against each row alone.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, TextStreamer, pipeline

import attnpred
from attnpred.hf import cache_argument
from attnpred.policies import Policy, Predicted
from attnpred.store.pool import BlockPool
from attnpred.telemetry import SEVERAL
from tests.hf.support import COVERING, SMALL, WHOLE, greedy, left_padded, text_of, tokenizer
from tests.models import prompt, tiny_model

NEW = 14
NewCache = Callable[[], Cache]


def generate(model: PreTrainedModel, tokens: Tensor, **settings: Any) -> list[Any]:
    settings.setdefault("attention_mask", torch.ones_like(tokens))
    if "cache" in settings:
        settings |= cache_argument(settings.pop("cache"))
    return model.generate(tokens, max_new_tokens=NEW, **settings).tolist()  # type: ignore[union-attr,no-any-return]


def sampling(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    torch.manual_seed(5)
    return generate(model, prompt(2, 45), do_sample=True, temperature=1.5, top_k=40, top_p=0.95)


def several_sequences(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    torch.manual_seed(6)
    return generate(model, prompt(2, 45), do_sample=True, num_return_sequences=3)


def beams(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    return generate(model, prompt(2, 45), do_sample=False, num_beams=3, num_return_sequences=2)


def padded_batch(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    tokens, mask = left_padded([prompt(1, 45), prompt(1, 30, 1), prompt(1, 9, 2)])
    return generate(model, tokens, attention_mask=mask, do_sample=False)


def padded_beams(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    tokens, mask = left_padded([prompt(1, 45), prompt(1, 18, 1)])
    return generate(model, tokens, attention_mask=mask, do_sample=False, num_beams=3)


def chunked_prefill(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    return generate(model, prompt(2, 45), do_sample=False, prefill_chunk_size=13)


def second_turn(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    cache = new_cache()
    first = generate(model, prompt(2, 45), do_sample=False, cache=cache)
    longer = torch.cat((torch.tensor(first), prompt(2, 11, 3)), 1)
    return first + generate(model, longer, do_sample=False, cache=cache)


def second_turn_of_one_token(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    cache = new_cache()
    first = generate(model, prompt(2, 45), do_sample=False, cache=cache)
    return first + generate(model, torch.tensor(first), do_sample=False, cache=cache)


def prompt_lookup(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    return generate(model, prompt(1, 15).repeat(1, 3), do_sample=False, prompt_lookup_num_tokens=4)


def assisted(model: PreTrainedModel, new_cache: NewCache, assistant: str = "qwen3") -> list[Any]:
    drafting = {
        "num_assistant_tokens": 3,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    config = tiny_model(assistant).generation_config
    before = {name: getattr(config, name) for name in drafting}
    vars(config).update(drafting)
    try:
        return generate(model, prompt(1, 45), do_sample=False, assistant_model=tiny_model(assistant))
    finally:
        vars(config).update(before)


def assisted_by_an_attached_model(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    return assisted(model, new_cache, assistant=model.config.model_type)


def streaming(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer(), skip_prompt=True)  # type: ignore[arg-type]
    streamer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)  # type: ignore[method-assign]
    generate(model, prompt(1, 45), do_sample=False, streamer=streamer)
    return pieces


def text_pipeline(model: PreTrainedModel, new_cache: NewCache) -> list[Any]:
    texts = [text_of(prompt(1, length, length)[0]) for length in (45, 20)]
    run = pipeline("text-generation", model=model, tokenizer=tokenizer(), batch_size=2)
    return run(texts, max_new_tokens=NEW, do_sample=False)  # type: ignore[no-any-return]


FEATURES = (
    sampling,
    several_sequences,
    beams,
    padded_batch,
    padded_beams,
    chunked_prefill,
    second_turn,
    second_turn_of_one_token,
    prompt_lookup,
    assisted,
    assisted_by_an_attached_model,
    streaming,
    text_pipeline,
)
VERIFIED_TOGETHER = (prompt_lookup, assisted, assisted_by_an_attached_model)
"""These check several drafted tokens in one call, which is dense, and crop those that were wrong."""
WITH_CALLS_OF_SEVERAL = (*VERIFIED_TOGETHER, chunked_prefill, second_turn)

MODES: dict[str, tuple[str, attnpred.CacheConfig]] = {
    "dense": ("ema", WHOLE),
    "sparse-ema": ("ema", COVERING),
    "sparse-predicted": ("predicted", COVERING),
}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text"])
def test_feature_gives_what_stock_generate_gives(family: str, feature: Callable[..., list[Any]]) -> None:
    model = tiny_model(family)
    try:
        stock = feature(model, partial(DynamicCache, config=model.config))
    except RuntimeError:
        if feature is not assisted_by_an_attached_model or family == "llama":
            raise
        pytest.skip("this transformers has no drafts by models with sliding layers")
    assert len(str(stock)) > 30
    for mode, (policy, settings) in MODES.items():
        with attnpred.attach(model, policy=policy, config=settings) as attached:
            got = feature(model, attached.new_cache)
        total = attached.stats()["total"]
        assert got == stock, mode
        assert (SEVERAL in total["dense"]) == (feature in WITH_CALLS_OF_SEVERAL), mode
        assert (total["sparse_steps"] > 0) == (mode != "dense"), mode
        assert total["fallbacks"] == 0


def test_beams_really_move_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the beam search above would not show that reordering is right."""
    seen: list[list[int]] = []
    select = BlockPool.select
    monkeypatch.setattr(BlockPool, "select", lambda self, rows: (seen.append(rows.tolist()), select(self, rows))[1])
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=COVERING):
        beams(model, DynamicCache)
    assert any(rows != sorted(rows) for rows in seen) and any(len(set(rows)) < len(rows) for rows in seen)


def test_streamed_text_is_the_generated_text() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=SMALL):
        text = "".join(streaming(model, DynamicCache))
        tokens = generate(model, prompt(1, 45), do_sample=False)[0][45:]
    assert text.split() == text_of(torch.tensor(tokens)).split()


def test_stats_of_calls_add_up_and_a_conversation_counts_once() -> None:
    model = tiny_model("llama")
    with attnpred.attach(model, policy="ema", config=SMALL) as attached:
        greedy(model, prompt(1, 100), 5)
        cache = attached.new_cache()
        first = greedy(model, prompt(1, 100), 5, cache=cache)
        greedy(model, first, 5, cache=cache)
        assert attached.stats()["layers"][0]["sparse_steps"] == 4 + 4 + 5
        assert cache.stats()["layers"][0]["sparse_steps"] == 4 + 5
        attached.reset_stats()
        assert attached.stats()["layers"] == []


@pytest.mark.parametrize("policy", ["oracle", "ema", "last_step", "streaming"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_rows_padded_by_whole_blocks_get_below_the_budget_what_each_gets_alone(family: str, policy: str) -> None:
    """Blocks are then cut at the same tokens. All rows are above the budget, and longer than the history.

    Not so for a predictor: in a padded row its convolutions see the sinks, where alone they see the picture's border.
    """
    model, rows = tiny_model(family), [prompt(1, 120), prompt(1, 100, 1), prompt(1, 88, 2)]
    tokens, mask = left_padded(rows)
    stock = greedy(model, tokens, NEW, attention_mask=mask)
    with attnpred.attach(model, policy=policy, config=SMALL) as attached:
        together = greedy(model, tokens, NEW, attention_mask=mask)
        assert attached.stats()["total"]["sparse_steps"] == attached.stats()["total"]["steps"] > 0
        alone = [greedy(model, row, NEW) for row in rows]
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got[-NEW:], want[0, -NEW:])
    assert not torch.equal(together, stock), "the budget must matter, or this proves nothing"


POLICIES: dict[str, Policy | str] = {
    "oracle": "oracle",
    "ema": "ema",
    "streaming": "streaming",
    "predicted": Predicted(),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_other_padding_leaves_the_longest_row_alone_and_stays_in_the_budget(policy: str) -> None:
    """A row that begins inside a block has other blocks than alone, so only the row without padding is compared."""
    model, rows = tiny_model("llama"), [prompt(1, 120), prompt(1, 101, 1), prompt(1, 3, 2)]
    tokens, mask = left_padded(rows)
    with attnpred.attach(model, policy=POLICIES[policy], config=SMALL) as attached:
        together = greedy(model, tokens, attention_mask=mask)
        assert attached.stats()["total"]["tokens_attended"] <= 64
        assert torch.equal(together[:1], greedy(model, rows[0]))
    assert bool((together < 97).all())


def test_padding_tokens_are_never_attended() -> None:
    """Below the budget, for rows that begin in the middle of a block and in the middle of the recent window."""
    model, rows = tiny_model("llama"), [prompt(1, 120), prompt(1, 101, 1), prompt(1, 5, 2)]
    tokens, mask = left_padded(rows)
    with attnpred.attach(model, policy="ema", config=SMALL):
        want = greedy(model, tokens, attention_mask=mask)
        got = greedy(model, tokens.masked_fill(mask == 0, 77), attention_mask=mask)
    assert torch.equal(got[:, 120:], want[:, 120:])


@pytest.mark.parametrize("budget", [83, 84, 85, 86])
def test_a_budget_of_just_the_context_is_dense_to_the_last_step(budget: int) -> None:
    """The last step attends to 83 tokens, whatever that is in whole blocks."""
    model = tiny_model("llama")
    stock = greedy(model, prompt(2, 60))
    with attnpred.attach(model, policy="ema", config=replace(SMALL, budget=budget)) as attached:
        assert torch.equal(greedy(model, prompt(2, 60)), stock)
    assert attached.stats()["total"]["sparse_steps"] == 0
