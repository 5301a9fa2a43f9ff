"""TidalDecode: layers between those that choose attend to exactly what the last of them chose."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attnpred
from attnpred.errors import ConfigError
from attnpred.hf.cache import TieredCache
from attnpred.policies.select import select_blocks, zone_at
from attnpred.policies.tidal import TidalDecode
from tests.hf.support import SMALL, greedy
from tests.models import prompt, tiny_model
from tests.policies.layer import CONFIG, HEADS, KV_HEADS, Layer, Text, best, chosen
from tests.policies.test_recycled import attention

PROMPT, STEPS = 61, 8


@pytest.mark.parametrize(
    ("settings", "layers", "wanted"),
    [
        ((2, 13), range(16), [0, 1, *[2] * 11, *[13] * 3]),
        ((2, 13), range(2, 16), [0, 1, *[2] * 11, *[13] * 3]),
        ((0, 0), range(4), [0, 0, 0, 0]),
        ((1, 3), [0, 2, 5], [0, 1, 2, 2, 2, 5]),  # layers 1, 3 and 4 slide
        ((2, 13), range(2), [0, 1]),
    ],
)
def test_who_chooses_for_whom(settings: tuple[int, int], layers: list[int], wanted: list[int]) -> None:
    policy = TidalDecode(*settings)
    assert [policy.leader(layer, list(layers)) for layer in range(len(wanted))] == wanted


def test_against_a_loop() -> None:
    """The leader attends to everything, the follower to the leader's best blocks, in the same step."""
    texts = [Text(PROMPT + STEPS, seed=seed) for seed in range(2)]
    leader = Layer(TidalDecode()).prompt(texts[0], PROMPT)
    follower = Layer(TidalDecode(), layer=5, leader=leader.decoder.memory).prompt(texts[1], PROMPT)
    group = HEADS // KV_HEADS
    for t in range(PROMPT, PROMPT + STEPS):
        leader.step(texts[0], t)
        follower.step(texts[1], t)
        for head in range(KV_HEADS):
            row = [0.0] * (t // 4 + 1)
            for h in range(head * group, (head + 1) * group):
                weights, output = attention(texts[0], h, t, None)
                assert leader.outputs[-1][0, h].tolist() == pytest.approx(output, abs=1e-5)
                for token, weight in weights.items():
                    row[token // 4] = max(row[token // 4], weight)
            blocks = best(row, t + 1)
            assert chosen(follower.blocks[-1])[head] == blocks
            for h in range(head * group, (head + 1) * group):
                output = attention(texts[1], h, t, blocks)[1]
                assert follower.outputs[-1][0, h].tolist() == pytest.approx(output, abs=1e-5)
    assert follower.decoder.memory.bytes() == 0 < leader.decoder.memory.bytes()


def test_layers_of_other_heads_share_one_choice() -> None:
    text = Text(PROMPT + 2)
    leader = Layer(TidalDecode()).prompt(text, PROMPT).step(text, PROMPT)
    wide = Layer(TidalDecode(), replace(CONFIG, per_query_head=True), 5, leader.decoder.memory).prompt(text, PROMPT)
    wide.step(text, PROMPT)
    row = leader.decoder.memory.row.view().amax(1)[0].tolist()
    assert chosen(wide.blocks[-1]) == [best(row, PROMPT + 1)] * HEADS


def chosen_by(cache: TieredCache) -> list[Tensor]:
    """Return what each layer attended to in the last step, [B, Hkv, K]."""
    found = [cache.decoders[i].attended for i in sorted(cache.decoders)]
    return [pair[1].sort().values for pair in found if pair is not None]


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
@torch.no_grad()
def test_in_a_model_the_layers_after_use_the_same_blocks(family: str) -> None:
    model, settings = tiny_model(family), SMALL
    with attnpred.attach(model, policy=TidalDecode(0, 2), config=settings) as handle:
        cache = handle.new_cache()
        greedy(model, prompt(2, 100), 5, cache=cache)
        first, *others = chosen_by(cache)
        length = cache.get_seq_length()
        assert torch.equal(first[0, 0], torch.arange(-(-length // 4)))
        row = cache.decoders[0].memory.row.view()
        wanted = select_blocks(row, zone_at(settings, length)).sort().values
        following = others[:1] if family == "llama" else others[-1:]
        assert all(torch.equal(blocks, wanted) for blocks in following)
        assert sum(blocks.shape[2] > wanted.shape[2] for blocks in others) == (1 if family == "llama" else 0)


@pytest.mark.parametrize("offload", [None, "cpu"])
@torch.no_grad()
def test_leaders_are_found_again_after_a_fork_and_a_load(offload: str | None, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, settings = tiny_model("llama"), replace(SMALL, offload=offload)
    with attnpred.attach(model, policy=TidalDecode(0, 2), config=settings) as handle:
        cache = handle.new_cache()
        model(prompt(2, 90), cache=cache)
        model(prompt(2, 1, 5), cache=cache)
        cache.save(tmp_path / "a.kv")
        others = [cache.fork(), TieredCache.load(tmp_path / "a.kv", model)]
        for other in others:
            assert other.decoders[1].memory.leader is other.decoders[0].memory is not cache.decoders[0].memory
        tokens = prompt(2, 1, 6)
        want = model(tokens, cache=cache).logits
        assert all(torch.equal(model(tokens, cache=other).logits, want) for other in others)


@pytest.mark.parametrize("wrong", [(-1, 2), (3, 2), (True, 2), (0, 2.5)])
def test_bad_layers_are_one_line(wrong: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="expected layers, counted from 0, in order") as caught:
        TidalDecode(*wrong)
    assert "\n" not in str(caught.value)
