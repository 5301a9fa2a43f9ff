"""Policies that evict equal simulations written from their descriptions, as loops over tokens; what is gone stays gone.

The simulations keep lists of tokens and attend with plain numbers. With blocks of one token, and a query head for each kv
head, they are the published methods; with larger blocks and groups, those that their files describe.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.errors import ConfigError, StoreError
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies import H2O, POLICIES, SepLLM, SnapKV, Streaming
from attnpred.policies.base import Policy
from attnpred.policies.snapkv import Window
from attnpred.store.base import Store
from attnpred.store.evicting import EvictingPool
from attnpred.store.pool import BlockPool
from attnpred.telemetry import LayerCounts

DIM, SCALE, PROMPT, STEPS = 8, 0.7, 61, 30
EVICTING = [name for name in POLICIES if POLICIES[name].evicts]


def settings(block: int, budget: int = 32, sinks: int = 4, recent: int = 8, **more: Any) -> CacheConfig:
    return CacheConfig(budget=budget, block_size=block, num_sink_tokens=sinks, recent_window=recent, history=8, **more)


class Text:
    """Queries, keys and values of a layer, the same for everyone: [1, heads, tokens, DIM]."""

    def __init__(self, kv_heads: int, group: int, tokens: int = PROMPT + STEPS, seed: int = 0, batch: int = 1) -> None:
        random = torch.Generator().manual_seed(seed)
        self.heads, self.group, self.tokens = kv_heads, group, tokens
        self.queries = torch.randn(batch, kv_heads * group, tokens, DIM, generator=random)
        self.ids = torch.randint(0, 9, (batch, tokens), generator=random)
        self.keys, self.values = (torch.randn(batch, kv_heads, tokens, DIM, generator=random) for _ in range(2))

    def weights(self, head: int, t: int, tokens: list[int]) -> dict[int, float]:
        """Return the attention of query head `head` at token t over `tokens`, row 0."""
        keys = self.keys[0, head // self.group]
        logits = {i: SCALE * float(self.queries[0, head, t] @ keys[i]) for i in tokens}
        total = sum(math.exp(x) for x in logits.values())
        return {i: math.exp(x) / total for i, x in logits.items()}

    def row(self, kv_head: int, t: int, tokens: list[int], block: int) -> dict[int, float]:
        """Return the largest probability of each block over the heads of a group."""
        row: dict[int, float] = {}
        for head in range(kv_head * self.group, (kv_head + 1) * self.group):
            for i, weight in self.weights(head, t, tokens).items():
                row[i // block] = max(row.get(i // block, 0.0), weight)
        return row

    def output(self, head: int, t: int, tokens: list[int]) -> Tensor:
        weights = self.weights(head, t, tokens)
        return sum(weight * self.values[0, head // self.group, i] for i, weight in weights.items())


class Naive:
    """One kv head of a policy that evicts: a list of tokens that are left, and what the policy knows about blocks."""

    def __init__(self, text: Text, head: int, config: CacheConfig) -> None:
        self.text, self.head, self.config, self.block = text, head, config, config.block_size
        self.left: list[int] = []
        self.worth: dict[int, float] = {}

    def add(self, row: dict[int, float]) -> None:
        for block, weight in row.items():
            self.worth[block] = self.worth.get(block, 0.0) + weight

    def places(self, length: int) -> tuple[int, int, int]:
        """Return sinks, recent blocks and the places between them, for `length` tokens to come to."""
        sinks, budget = self.config.num_sink_tokens // self.block, self.config.budget // self.block
        recent = -(-length // self.block) - (length - self.config.recent_window) // self.block
        return sinks, recent, budget - sinks - (self.config.recent_window // self.block + 1)

    def evict(self, stays: set[int]) -> None:
        self.left = [i for i in self.left if i // self.block in stays]

    def blocks(self) -> list[int]:
        return sorted({i // self.block for i in self.left})


class NaiveStreaming(Naive):
    def prompt(self, length: int) -> None:
        self.left = list(range(length))
        self.drop(length)

    def drop(self, length: int) -> None:
        """Make room before token `length` comes: sinks, and the newest blocks that the budget holds."""
        sinks, recent, free = self.places(length + 1)
        last = length // self.block
        self.evict(set(range(sinks)) | set(range(last + 1 - recent - free, last + 1)))

    def step(self, t: int) -> None:
        self.left.append(t)

    after = drop


class NaiveH2O(Naive):
    def prompt(self, length: int) -> None:
        for t in range(length):
            self.add(self.text.row(self.head, t, list(range(t + 1)), self.block))
        self.left = list(range(length))
        self.after(length)

    def step(self, t: int) -> None:
        self.left.append(t)
        self.add(self.text.row(self.head, t, self.left, self.block))

    def after(self, length: int) -> None:
        sinks, recent, free = self.places(length + 1)
        last, share = length // self.block, (sinks + recent + free) // 2
        stays = set(range(sinks)) | set(range(last + 1 - max(recent, share), last + 1))
        others = [block for block in self.blocks() if block not in stays]
        heavy = sorted(others, key=lambda block: -self.worth[block])[: sinks + recent + free - len(stays)]
        self.evict(stays | set(heavy))


class NaiveSepLLM(Naive):
    def prompt(self, length: int) -> None:
        self.left = list(range(length))
        self.after(length)

    def step(self, t: int) -> None:
        self.left.append(t)

    def after(self, length: int) -> None:
        policy, ids = SEPLLM, self.text.ids[0].tolist()
        sinks, recent, free = self.places(length + 1)
        first = max(0, length + 1 - policy.neighbours) // self.block
        places: list[int] = []  # of separators before the neighbours, the newest `most` of them
        for token in reversed(range(min(first * self.block, length))):
            if ids[token] in policy.separators and len(places) < policy.most:
                places.append(token)
        last = length // self.block
        stays = set(range(sinks)) | set(range(last + 1 - recent, last + 1))
        neighbours = [block for block in range(first, last + 1) if block not in stays]
        others = [block for block in self.blocks() if block not in stays and block < first]
        others.sort(key=lambda block: (sum(token // self.block == block for token in places), block))
        self.evict(stays | set((others + neighbours)[-free:]))


class NaiveSnapKV(Naive):
    window, kernel = 12, 5

    def prompt(self, length: int) -> None:
        for t in range(length - self.window, length):
            self.add(self.text.row(self.head, t, list(range(t + 1)), self.block))
        self.left = list(range(length))
        reach = self.kernel // 2 // self.block
        total = [self.worth.get(block, 0.0) for block in range(-(-length // self.block))]
        padded = [0.0] * reach + total + [0.0] * reach
        pooled = [sum(padded[i : i + 2 * reach + 1]) / (2 * reach + 1) for i in range(len(total))]
        # Places are those of the prompt itself: what comes after it is beyond the budget.
        sinks, recent, free = self.places(length)
        stays = set(range(sinks)) | set(range(len(total) - recent, len(total)))
        windowed = [b for b in range(len(total) - -(-self.window // self.block), len(total)) if b not in stays]
        others = [block for block in range(len(total)) if block not in stays and block not in windowed]
        best = sorted(others, key=lambda block: -pooled[block])[: free - len(windowed)]
        self.evict(stays | set(windowed) | set(best))

    def step(self, t: int) -> None:
        self.left.append(t)

    def after(self, length: int) -> None:
        """Nothing is evicted after the prompt."""


SEPLLM = SepLLM((2, 5, 6), most=7, neighbours=14)
CASES: dict[str, tuple[Policy[Any], type[Any]]] = {
    "streaming": (Streaming(), NaiveStreaming),
    "h2o": (H2O(), NaiveH2O),
    "snapkv": (SnapKV(window=12), NaiveSnapKV),
    "sepllm": (SEPLLM, NaiveSepLLM),
}
SHAPES = [(1, 1), (4, 1), (4, 2)]


def read(decoder: LayerDecoder, text: Text, first: int, last: int) -> None:
    if decoder.policy.reads_tokens:
        decoder.memory.read(text.ids[:, first:last], last)


def begin(
    policy: Policy[Any], config: CacheConfig, text: Text, store: Store, length: int = PROMPT
) -> tuple[LayerDecoder, AttentionTerms]:
    decoder, terms = LayerDecoder(config, policy, LayerCounts()), AttentionTerms(SCALE)
    store.append(text.keys[:, :, :length], text.values[:, :, :length])
    read(decoder, text, 0, length)
    decoder.observe(text.queries[:, :, :length], store, terms, None, prompt=True, keys=text.keys[:, :, :length])
    return decoder, terms


def run(
    policy: Policy[Any], config: CacheConfig, text: Text, store: Store
) -> Iterator[tuple[int, LayerDecoder, Tensor]]:
    """Yield length, decoder and output of every step."""
    decoder, terms = begin(policy, config, text, store)
    for t in range(PROMPT, text.tokens):
        store.append(text.keys[:, :, t : t + 1], text.values[:, :, t : t + 1])
        read(decoder, text, t, t + 1)
        yield t + 1, decoder, decoder.step(text.queries[:, :, t], store, terms, None)


def blocks_of(ids: Tensor) -> list[int]:
    return sorted(block for block in ids.tolist() if block >= 0)


def held(store: EvictingPool, head: int, row: int = 0) -> list[int]:
    """Return the blocks that the store really has."""
    if store.ids is None:
        return list(range(-(-store.length // store.block_size)))
    return blocks_of(store.ids[row, head])


@pytest.mark.parametrize("block, group", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_simulation(name: str, block: int, group: int) -> None:
    policy, kind = CASES[name]
    config, text, store = settings(block), Text(2, group), EvictingPool(block)
    naive = [kind(text, head, config) for head in range(2)]
    for one in naive:
        one.prompt(PROMPT)
    for length, decoder, output in run(policy, config, text, store):
        for head, one in enumerate(naive):
            one.step(length - 1)
            assert blocks_of(decoder.attended[1][0, head]) == one.blocks(), f"{length} tokens, head {head}"
            for query_head in range(head * group, (head + 1) * group):
                want = text.output(query_head, length - 1, one.left)
                torch.testing.assert_close(output[0, query_head], want, rtol=1e-4, atol=1e-5)
            one.after(length)
            assert set(held(store, head)) >= set(one.blocks())
    assert any(one.blocks() != naive[0].blocks() for one in naive) == (name not in ("streaming", "sepllm"))


def test_every_policy_that_evicts_has_a_simulation() -> None:
    assert set(CASES) == set(EVICTING)


# Defining properties, for each in the table


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_dropped_block_never_comes_back_and_its_bytes_are_free(name: str, block: int) -> None:
    policy = CASES[name][0]
    config, text, store = settings(block), Text(2, 2, PROMPT + 80), EvictingPool(block)
    full = BlockPool(block)
    full.append(text.keys[:, :, :PROMPT], text.values[:, :, :PROMPT])
    before, ever = full.fast_bytes(), [set[int](), set[int]()]
    known = -(-PROMPT // block)
    for length, decoder, _ in run(policy, config, text, store):
        full.append(text.keys[:, :, length - 1 : length], text.values[:, :, length - 1 : length])
        chosen = [set(blocks_of(decoder.attended[1][0, head])) for head in range(2)]
        for head in range(2):
            assert not chosen[head] & ever[head], f"{length} tokens, head {head}"
            # what was there before this step, and was not attended in it, is gone
            ever[head] |= set(range(known)) - chosen[head]
            attended = sum(min((b + 1) * block, length) - b * block for b in chosen[head])
            most = config.budget + (length - PROMPT if policy.keeps_decoded else 0)
            assert attended <= most
            assert set(range(4 // block)) <= chosen[head]
            assert set(range((length - 8) // block, -(-length // block))) <= chosen[head]
        known = -(-length // block)
        slots = max(len(held(store, head)) for head in range(2))
        tokens = store.keys.shape[2]
        assert tokens <= (slots + slots // 8 + 2) * block + 64 and store.pool.fast_bytes() < full.fast_bytes()
    assert all(ever) and before < full.fast_bytes()
    assert decoder.counts.calibration_bytes == 0


@pytest.mark.parametrize("name", CASES)
def test_bytes_do_not_grow_with_the_context(name: str) -> None:
    """But for what the policy keeps by its description, and the table of blocks, which is a number for each."""
    sizes, policy = [], CASES[name][0]
    for tokens in (400, 1600):
        store, text = EvictingPool(4), Text(2, 1, tokens)
        begin(policy, settings(4), text, store, tokens)
        sizes.append(store.pool.fast_bytes())
        assert store.fast_bytes() - store.pool.fast_bytes() < 8 * 2 * (tokens // 4 + 32)
    assert sizes[0] == sizes[1] < 2 * 2 * (32 + 64 + 8) * DIM * 4


@pytest.mark.parametrize("name", CASES)
def test_a_store_that_frees_nothing_gives_the_same_bits(name: str) -> None:
    policy, text, config = CASES[name][0], Text(2, 2, batch=2), settings(4)
    evicting = run(policy, config, text, EvictingPool(4))
    for (_, one, got), (_, other, want) in zip(evicting, run(policy, config, text, BlockPool(4)), strict=True):
        assert torch.equal(got, want) and torch.equal(one.attended[1], other.attended[1])


@pytest.mark.parametrize("name", CASES)
def test_it_chooses_at_every_step_whatever_the_interval(name: str) -> None:
    """Or what is passed over for a few steps would come back."""
    policy, text = CASES[name][0], Text(2, 2)
    intervals = ({}, {"selection_interval": 5, "calibration_interval": 3})  # nor does it ask for true rows
    often, seldom = (run(policy, settings(4, **more), text, EvictingPool(4)) for more in intervals)
    for (_, one, _), (_, other, _) in zip(often, seldom, strict=True):
        assert torch.equal(one.attended[1], other.attended[1])


@pytest.mark.parametrize("block, group", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_a_call_of_several_tokens_attends_to_what_is_left(name: str, block: int, group: int) -> None:
    """A second turn, of 20 tokens: every query sees what the prompt left, and the tokens before it."""
    policy, kind = CASES[name]
    config, text, store = settings(block), Text(2, group, PROMPT + 20), EvictingPool(block)
    decoder, terms = begin(policy, config, text, store)
    naive = [kind(text, head, config) for head in range(2)]
    store.append(text.keys[:, :, PROMPT:], text.values[:, :, PROMPT:])
    read(decoder, text, PROMPT, PROMPT + 20)
    output = decoder.attend(text.queries[:, :, PROMPT:], store, terms, None, remember=True)
    for head, one in enumerate(naive):
        one.prompt(PROMPT)
        for t in range(PROMPT, PROMPT + 20):
            one.step(t)
            for query_head in range(head * group, (head + 1) * group):
                want = text.output(query_head, t, one.left)
                torch.testing.assert_close(output[0, query_head, t - PROMPT], want, rtol=1e-4, atol=1e-5)
        if name != "snapkv":  # for which this is the end of a prompt, so that it chooses anew
            one.after(PROMPT + 20)
            coming = [one.text.tokens // block] if one.text.tokens % block == 0 else []
            assert blocks_of(decoder.pending[1][0, head]) == one.blocks() + coming


def test_snapkv_keeps_all_that_is_decoded_and_chooses_again_at_a_second_turn() -> None:
    policy, text, config = SnapKV(window=12), Text(2, 1, PROMPT + 60), settings(4)
    store = EvictingPool(4)
    decoder, terms = begin(policy, config, text, store)
    for t in range(PROMPT, PROMPT + 40):
        store.append(text.keys[:, :, t : t + 1], text.values[:, :, t : t + 1])
        decoder.step(text.queries[:, :, t], store, terms, None)
    assert decoder.attended[1].shape[2] * 4 > config.budget + 36
    assert set(range(PROMPT // 4, (PROMPT + 40) // 4)) <= set(held(store, 0))
    rest = slice(PROMPT + 40, PROMPT + 60)
    store.append(text.keys[:, :, rest], text.values[:, :, rest])
    decoder.attend(text.queries[:, :, rest], store, terms, None, remember=True)
    assert decoder.pending[1].shape[2] * 4 <= config.budget + 4


def test_the_window_of_snapkv_may_come_in_pieces() -> None:
    rows, memory = torch.rand(1, 2, 20, 9), Window(12, 4)
    memory.push(rows[:, :, :5, :6])
    memory.push(rows[:, :, 5:8])
    want = torch.nn.functional.pad(rows[:, :, :5, :6].sum(2), (0, 3)) * 0.75 + rows[:, :, 5:8].sum(2)
    torch.testing.assert_close(memory.row.view(), want)
    memory.push(rows[:, :, 8:])
    torch.testing.assert_close(memory.row.view(), rows[:, :, 8:].sum(2))


def test_a_short_prompt_is_kept_whole_by_snapkv() -> None:
    policy, text, store = SnapKV(window=12), Text(1, 1, 90), EvictingPool(4)
    decoder, _ = begin(policy, settings(4), text, store, 20)
    assert all(decoder.fits(length) for length in range(20, 90)) and store.ids is None


# Hyper-parameters and refusals


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: H2O(1.5), "got recent_share=1.5, expected a share of the budget from 0 to 1"),
        (lambda: H2O(float("nan")), "got recent_share=nan"),
        (lambda: SnapKV(window=0), "got window=0, expected a whole number of at least 1"),
        (lambda: SnapKV(kernel=4), "got kernel=4, expected an odd number"),
        (lambda: SepLLM((1, -2)), "got separators=.1, -2., expected token ids"),
        (lambda: SepLLM(most=-1), "got most=-1, expected a whole number of tokens of at least 0"),
        (lambda: SepLLM(neighbours=2.5), "got neighbours=2.5"),
        (lambda: SnapKV(pooling="sum"), "got pooling='sum', expected 'avg' or 'max'"),
    ],
)
def test_hyper_parameters_out_of_range_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EVICTING)
def test_one_selection_per_query_head_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="got per_query_head with a policy that evicts"):
        LayerDecoder(settings(4, per_query_head=True), POLICIES[name](), LayerCounts())


def test_a_crop_into_what_is_gone_is_refused_before_anything_changes() -> None:
    store, text = EvictingPool(4), Text(2, 1)
    decoder, _ = begin(Streaming(), settings(4), text, store)
    decoder.left.require(PROMPT - 8, 4)
    with pytest.raises(StoreError, match="got a crop to 20 tokens, expected to keep the recent window"):
        decoder.left.require(20, 4)
    with pytest.raises(StoreError, match="got a crop to 20 tokens"):
        store.crop(20)
    assert store.length == PROMPT


def test_separators_are_the_tokens_made_of_marks_alone() -> None:
    class Tokenizer:
        words = ("a", ".", " ,", "a.", "\n\n", "", " ", "?!", "-", ".b")

        def __len__(self) -> int:
            return len(self.words)

        def batch_decode(self, ids: list[list[int]]) -> list[str]:
            return ["".join(self.words[i] for i in row) for row in ids]

    assert SepLLM.for_tokenizer(Tokenizer()).separators == (1, 2, 4, 6, 7)


def test_separators_without_token_ids_are_an_error() -> None:
    text = Text(1, 1)
    store = EvictingPool(4)
    store.append(text.keys[:, :, :PROMPT], text.values[:, :, :PROMPT])
    decoder = LayerDecoder(settings(4), SEPLLM, LayerCounts())
    with pytest.raises(ConfigError, match="got no token ids, expected them: run this policy in a model inside"):
        decoder.observe(text.queries[:, :, :PROMPT], store, AttentionTerms(SCALE), None, prompt=True)
