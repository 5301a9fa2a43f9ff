"""Policies that evict equal simulations written from their descriptions, as loops over tokens; what is gone stays gone.

The simulations keep lists of tokens and attend with plain numbers. With blocks of one token, and a query head for each kv
head, they are the published methods; with larger blocks and groups, those that their files describe.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.errors import ConfigError, StoreError
from attnpred.kernels.dense import AttentionTerms
from attnpred.policies import H2O, POLICIES, Cascading, FastGen, SepLLM, SnapKV, Streaming, SubGen
from attnpred.policies.base import Policy, View
from attnpred.policies.fastgen import first_local
from attnpred.policies.select import select_blocks, zone_at
from attnpred.policies.snapkv import Window
from attnpred.store.base import Store
from attnpred.store.evicting import EvictingPool
from attnpred.store.pool import SPARE, BlockPool
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


class NaiveFastGen(Naive):
    """Profiles its head over the prompt, query by query, and keeps the chosen kinds of tokens at every step."""

    def prompt(self, length: int) -> None:
        self.left = list(range(length))
        self.profile(0, length)

    def profile(self, first: int, length: int) -> None:
        """A prompt, or another, of the tokens from `first` on."""
        self.near: dict[int, float] = {}
        self.worth.clear()
        for t in range(first, length):
            row = self.text.row(self.head, t, [i for i in self.left if i <= t], self.block)
            self.add(row)
            for block, weight in row.items():
                if block >= self.first_local(t + 1):
                    self.near[block] = self.near.get(block, 0.0) + weight
        kinds = self.kinds(length)
        total = sum(self.worth.values())
        held = [sum(self.worth.get(block, 0.0) for block in kind) for kind in kinds[:3]]
        others = set(self.worth) - kinds[2]
        held.append(held[2] + sum(self.near.get(block, 0.0) for block in others))
        self.choice = next((i for i, mass in enumerate(held) if mass >= FASTGEN.mass * total), 4)
        self.after(length)

    def first_local(self, length: int) -> int:
        return (length - math.ceil(FASTGEN.local * length)) // self.block

    def most(self, counts: dict[int, float], count: int) -> set[int]:
        return set(sorted(counts, key=lambda block: (-counts[block], -block))[:count])

    def kinds(self, length: int) -> list[set[int]]:
        """Return the compositions of a cache of `length` tokens that one more will come to."""
        blocks, ids = -(-(length + 1) // self.block), self.text.ids[0].tolist()
        sinks, recent, _ = self.places(length + 1)
        kinds = [set(range(sinks)) | set(range(blocks - recent, blocks))]
        for wanted in (FASTGEN.special, FASTGEN.punctuation):
            counts: dict[int, float] = {}
            for i in range(length):
                if ids[i] in wanted:
                    counts[i // self.block] = counts.get(i // self.block, 0) + 1
            kinds.append(kinds[-1] | self.most(counts, math.ceil(sum(counts.values()) / self.block)))
        frequent = {block: self.worth.get(block, 0.0) for block in range(blocks)}
        kinds.append(kinds[-1] | self.most(frequent, math.ceil(FASTGEN.frequent * (length + 1) / self.block)))
        kinds.append(kinds[-1] | set(range(self.first_local(length + 1), blocks)))
        return [*kinds[1:], set(range(blocks))]

    def step(self, t: int) -> None:
        self.left.append(t)
        self.add(self.text.row(self.head, t, self.left, self.block))

    def after(self, length: int) -> None:
        sinks, recent, free = self.places(length + 1)
        last = length // self.block
        stays = set(range(sinks)) | set(range(last + 1 - recent, last + 1))
        others = [block for block in self.kinds(length)[self.choice] & set(self.blocks()) if block not in stays]
        self.evict(stays | set(sorted(others, key=lambda block: -self.worth.get(block, 0.0))[:free]))


class NaiveCascading(Naive):
    """Sub-caches as lists of entries, oldest first; an entry is the list of the blocks it stands for that are left."""

    def prompt(self, length: int) -> None:
        for t in range(length):
            self.fade(self.text.row(self.head, t, list(range(t + 1)), self.block))
        self.left = list(range(length))
        sinks, _, free = self.places(length + 1)
        widest = self.config.recent_window // self.block + 1
        self.size = (free + widest) // CASCADING.cascades
        first = free + widest - (CASCADING.cascades - 1) * self.size
        self.behind = first - widest  # blocks of the first sub-cache behind the recent window
        self.caches: list[list[list[int]]] = [[] for _ in range(CASCADING.cascades)]
        self.arrivals, self.rest, self.next = [0] * CASCADING.cascades, list[int](), sinks
        self.after(length)

    def fade(self, row: dict[int, float]) -> None:
        for block in {*row, *self.worth}:
            old = self.worth.get(block, 0.0) * CASCADING.decay
            self.worth[block] = old + (1 - CASCADING.decay) * row.get(block, 0.0)

    def arrive(self, entry: list[int], j: int) -> None:
        """An entry that fell out of sub-cache j - 1 comes to sub-cache j."""
        if j == len(self.caches):
            self.rest += entry
            return
        accepted = self.arrivals[j] % 2 == 0
        self.arrivals[j] += 1
        if not accepted:
            self.caches[j][-1] += entry  # the newest entry: one of the two will be dropped
            return
        self.caches[j].append(entry)
        if len(self.caches[j]) > self.size:
            self.arrive(self.caches[j].pop(0), j + 1)

    def step(self, t: int) -> None:
        self.left.append(t)
        self.fade(self.text.row(self.head, t, self.left, self.block))

    def after(self, length: int) -> None:
        sinks, recent, free = self.places(length + 1)
        last = length // self.block
        while self.next < last + 1 - recent - self.behind:
            self.arrive([self.next], 1)
            self.next += 1
        stays = set(range(sinks)) | set(range(self.next, last + 1))
        for entry in (entry for cache in self.caches for entry in cache):
            stays.add(max(entry, key=lambda block: (self.worth[block], -block)))
        losers = [block for block in self.blocks() if block not in stays]
        room = sinks + free + recent - len(stays)
        stays |= set(sorted(losers, key=lambda block: -self.worth[block])[:room])
        self.evict(stays)
        for cache in self.caches:
            for entry in cache:
                entry[:] = [block for block in entry if block in stays]


class NaiveSubGen(Naive):
    """Centres as a list of blocks; distances between mean keys, one at a time."""

    def apart(self, one: int, other: int) -> float:
        keys = self.text.keys[0, self.head]
        a, b = (keys[i * self.block : (i + 1) * self.block].mean(0) for i in (one, other))
        return float((a - b).norm())

    def prompt(self, length: int) -> None:
        self.left, self.centres, self.next = list(range(length)), list[int](), 0
        self.after(length)

    def step(self, t: int) -> None:
        self.left.append(t)

    def after(self, length: int) -> None:
        sinks, recent, free = self.places(length + 1)
        last = length // self.block
        newest = max(
            0,
            int(SUBGEN.recent_share * self.config.budget / self.block) - (self.config.recent_window // self.block + 1),
        )
        first, room = last + 1 - recent - newest, free - newest
        coming = list(range(max(sinks, self.next), first))
        self.next = first
        if len(coming) > 1:
            points, chosen = self.centres + coming, [(self.centres + coming)[0]]
            while len(chosen) < room:
                far = max((p for p in points if p not in chosen), key=lambda p: min(self.apart(p, c) for c in chosen))
                if min(self.apart(far, c) for c in chosen) <= SUBGEN.delta:
                    break
                chosen.append(far)
            self.centres = sorted(chosen)
        elif coming:
            self.centres += coming
            pairs = [(self.apart(a, b), a, b) for a in self.centres for b in self.centres if a < b]
            distance, _, newer = min(pairs)
            if len(self.centres) > room or distance <= SUBGEN.delta:
                self.centres.remove(newer)
        self.evict(set(range(sinks)) | set(self.centres) | set(range(first, last + 1)))


SEPLLM = SepLLM((2, 5, 6), most=7, neighbours=14)
FASTGEN = FastGen((0,), (5,), mass=0.62, frequent=0.15, local=0.15)
CASCADING = Cascading(cascades=3, decay=0.9)
SUBGEN = SubGen(delta=0.6)
CASES: dict[str, tuple[Policy[Any], type[Any]]] = {
    "streaming": (Streaming(), NaiveStreaming),
    "h2o": (H2O(), NaiveH2O),
    "snapkv": (SnapKV(window=12), NaiveSnapKV),
    "sepllm": (SEPLLM, NaiveSepLLM),
    "fastgen": (FASTGEN, NaiveFastGen),
    "cascading": (CASCADING, NaiveCascading),
    "subgen": (SUBGEN, NaiveSubGen),
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
    if store.slot_of is None:
        return list(range(-(-store.length // store.block_size)))
    return (store.slot_of[row, head] >= 0).nonzero()[:, 0].tolist()


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
        assert tokens <= (slots + slots // 8 + 2) * block + 64 and store.held_bytes() < full.fast_bytes()
    assert all(ever) and before < full.fast_bytes()
    assert decoder.counts.calibration_bytes == 0


@pytest.mark.parametrize("name", CASES)
def test_bytes_do_not_grow_with_the_context(name: str) -> None:
    """But for what the policy keeps by its description, and the table of blocks, which is a number for each."""
    sizes, policy = [], CASES[name][0]
    for tokens in (400, 1600):
        store, text = EvictingPool(4), Text(2, 1, tokens)
        begin(policy, settings(4), text, store, tokens)
        sizes.append(store.held_bytes())
        assert store.fast_bytes() - store.held_bytes() < 8 * 2 * (tokens // 4 + 32)
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
        if name == "fastgen":  # for which this is a prompt, so that it chooses anew
            one.profile(PROMPT, PROMPT + 20)
        elif name != "snapkv":  # for which it is, too
            one.after(PROMPT + 20)
        if name != "snapkv":
            coming = [one.text.tokens // block] if one.text.tokens % block == 0 else []
            assert blocks_of(decoder.pending[1][0, head]) == one.blocks() + coming


def profile_of(rows: Tensor, length: int, **more: Any) -> tuple[FastGen, View[Any]]:
    """Return a policy that knows what rows [1, Hkv, Q, N] say, and what it is shown, in blocks of one token."""
    config, policy = settings(1, budget=length - 1), FastGen((3,), (7,), **more)
    memory = policy.memory(config, 0)
    memory.read(
        (torch.arange(length) == 10).long()[None] * 3 + (torch.arange(length) % 9 == 0).long()[None] * 7, length
    )
    memory.push(rows)
    return policy, View(memory, zone_at(config, length + 1))


@pytest.mark.parametrize("wanted, choice", [(2, 0), (10, 0), (9, 1), (20, 2), (-1, 3), (None, 4)])
def test_fastgen_takes_the_cheapest_composition_that_holds_the_mass(wanted: int | None, choice: int) -> None:
    """Attention to a sink, to the special token, to punctuation, to one token, of each to itself, to all alike."""
    length = 100
    rows = torch.full((1, 1, length, length), 0.02 / length)
    if wanted is None:
        rows = torch.full((1, 1, length, length), 1.0).tril()
        rows /= rows.sum(-1, keepdim=True)
    else:
        queries = torch.arange(length)
        rows[0, 0, queries, queries if wanted < 0 else torch.tensor(wanted)] += 0.98
    policy, shown = profile_of(rows, length, frequent=0.02, local=0.1)
    scores = policy.score(shown)[0, 0]
    assert int(shown.memory.choice) == choice
    kept = set(scores.isfinite().nonzero()[:, 0].tolist())
    always = set(range(4)) | set(range(101 - 8, 101)) | {10}
    marks = set(range(0, 100, 9))
    assert kept >= always and (len(kept) == 101) == (choice == 4)
    if choice == 0:
        assert kept == always
    if choice >= 1:
        assert kept >= always | marks
    if choice == 1:
        assert kept == always | marks
    if choice == 2:
        assert wanted in kept and len(kept - always - marks) <= 3
    if choice == 3:
        assert set(range(101 - 11, 101)) <= kept and len(kept) < 40


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.8, 0.95])
def test_the_choice_of_fastgen_holds_and_no_cheaper_one_would(mass: float) -> None:
    rows = torch.softmax(4 * torch.randn(1, 6, 100, 100, generator=torch.Generator().manual_seed(1)).tril(), -1).tril()
    rows /= rows.sum(-1, keepdim=True)
    policy, shown = profile_of(rows, 100, mass=mass)
    kept = policy.score(shown)[0].isfinite()[:, :100]
    seen = rows[0] * kept[:, None]
    for head, choice in enumerate(shown.memory.choice[0].tolist()):
        local = rows[0, head] * (
            torch.arange(100) >= torch.tensor([first_local(t + 1, 0.3) for t in range(100)])[:, None]
        )
        held = torch.maximum(seen[head], local) if choice == 3 else seen[head]
        assert held.sum() >= mass * 100 * 0.999 or choice == 4
        if choice:
            cheaper = replace(policy, mass=0.0)
            shown.memory.choice = torch.full((1, 6), choice - 1)
            less = cheaper.score(shown)[0, head].isfinite()[:100]
            least = rows[0, head] * less
            assert (torch.maximum(least, local) if choice == 4 else least).sum() < mass * 100 or bool(
                (least == 0).all()
            )


def test_fastgen_frees_head_by_head_and_one_that_keeps_everything_costs_no_other_head() -> None:
    """The defining property: bytes are near the sum over heads, not heads times the largest."""
    length, heads = 2048, 4
    store, keys = EvictingPool(4), torch.randn(1, heads, length, DIM)
    queries = torch.zeros(1, heads, length, DIM)
    keys[:, 1:] = 0.0
    keys[:, 1:, :4, 0] = 40.0  # all but the first attend to the sinks, which is cheap
    queries[:, 1:, :, 0] = 1.0
    config = settings(4, budget=length - 8)
    decoder, terms = LayerDecoder(config, FastGen(), LayerCounts()), AttentionTerms(SCALE)
    store.append(keys, keys)
    before = store.fast_bytes()
    decoder.observe(queries, store, terms, None, prompt=True, keys=keys)
    assert decoder.memory.choice.tolist() == [[4, 0, 0, 0]]
    counts = [len(held(store, head)) for head in range(heads)]
    assert counts[0] >= length // 4 - 4 and max(counts[1:]) <= 6
    token = 2 * DIM * 4
    assert store.held_bytes() == (sum(counts) * 4 + heads * SPARE) * token < 0.3 * heads * max(counts) * 4 * token
    assert store.fast_bytes() < 0.35 * before
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (store.keys, store.values)}
    assert sum(own.values()) == store.held_bytes()  # what torch has allocated for them, not what we say
    for t in range(20):
        new = torch.randn(1, heads, 1, DIM)
        store.append(new, new)
        decoder.step(queries[:, :, t], store, terms, None)
    counts = [len(held(store, head)) for head in range(heads)]
    assert store.held_bytes() <= (sum(counts) * 4 * 9 / 8 + heads * (SPARE + 4)) * token


def reach(cascades: int, tokens: int = 4000) -> tuple[int, int]:
    """Return how many tokens behind the sinks are kept, and the age of the oldest of them."""
    config, policy = settings(1, budget=84), Cascading(cascades)
    memory = policy.memory(config, 0)
    memory.push(torch.rand(1, 1, 1, tokens, generator=torch.Generator().manual_seed(0)))
    zone = zone_at(config, tokens + 1)
    kept = set(select_blocks(policy.score(View(memory, zone)), zone)[0, 0].tolist()) - set(range(4))
    # what lost may stay as long as there is room: not here
    return len(kept), tokens - min(kept)


def test_the_reach_of_cascading_doubles_with_every_sub_cache_at_the_same_size() -> None:
    for cascades in (1, 2, 4, 5):
        size = 80 // cascades
        count, age = reach(cascades)
        assert count == 79  # the recent window is a block less than planned with blocks of one token
        assert abs(age - size * (2**cascades - 1)) <= 2 ** (cascades - 1) + size, (cascades, age)
    assert reach(5)[1] > 6 * reach(1)[1]


def test_cascading_with_one_sub_cache_is_streaming() -> None:
    text = Text(2, 1)
    one, other = (run(policy, settings(4), text, EvictingPool(4)) for policy in (Cascading(1), Streaming()))
    for (_, left, _), (_, right, _) in zip(one, other, strict=True):
        assert torch.equal(left.attended[1].sort(-1).values, right.attended[1].sort(-1).values)


def test_the_spacing_of_cascading_doubles_from_sub_cache_to_sub_cache() -> None:
    config, policy = settings(1, budget=84), Cascading(4)
    memory = policy.memory(config, 0)
    memory.push(torch.ones(1, 1, 1, 2000))  # all alike: the first of each stretch stays
    zone = zone_at(config, 2001)
    kept = sorted(set(select_blocks(policy.score(View(memory, zone)), zone)[0, 0].tolist()) - set(range(4)))
    steps = [b - a for a, b in itertools.pairwise(kept)]
    assert steps == sorted(steps, reverse=True) and {steps.count(size) for size in (2, 4)} <= {19, 20, 21}
    assert set(steps) <= {1, 2, 3, 4, 6, 8} and steps[0] == 8


@pytest.mark.parametrize("delta", [0.0, 2.5])
def test_what_subgen_drops_is_near_a_centre_and_centres_are_apart(delta: float) -> None:
    """Of the greedy method at the end of a prompt: no key is farther from its centre than centres are from each other."""
    text, store = Text(2, 1, 300), EvictingPool(1)
    begin(SubGen(delta, recent_share=0.0), settings(1, budget=80 if delta == 0 else 250), text, store, 300)
    first = 300 + 1 - 8 - 1
    for head in range(2):
        points = text.keys[0, head]
        kept = [i for i in held(store, head) if 4 <= i < first]
        dropped = [i for i in range(4, first) if i not in kept]
        apart = min(float((points[a] - points[b]).norm()) for a in kept for b in kept if a < b)
        far = max(min(float((points[i] - points[c]).norm()) for c in kept) for i in dropped)
        assert dropped and far <= max(apart, delta) + 1e-5 and apart > delta
        if delta:
            assert far <= delta and len(kept) < 230


def test_padding_on_the_left_is_no_key_to_subgen() -> None:
    """A row with 40 tokens of padding keeps what it keeps without."""
    alone, padded, pad = Text(2, 1, 200), Text(2, 1, 240, seed=1), 40
    for name in ("queries", "keys", "values"):
        getattr(padded, name)[:, :, pad:] = getattr(alone, name)
    padded.keys[:, :, :pad] *= 9  # which would be centres, were they keys
    mask = (torch.ones(240, 240).tril() * (torch.arange(240) >= pad)).bool()[None]
    found = []
    for text, shown in ((alone, None), (padded, mask)):
        decoder = LayerDecoder(settings(4, budget=80), SubGen(), LayerCounts())
        store = EvictingPool(4)
        store.append(text.keys, text.values)
        decoder.observe(text.queries, store, AttentionTerms(SCALE), shown, prompt=True, keys=text.keys)
        found.append([held(store, head) for head in range(2)])
    assert found[1] == [[block + pad // 4 for block in head] for head in found[0]]


def test_subgen_of_equal_keys_keeps_one_of_each() -> None:
    random = torch.Generator().manual_seed(0)
    kinds = torch.randn(1, 1, 5, DIM, generator=random)
    text = Text(1, 1, 200)
    text.keys = kinds[:, :, torch.randint(0, 5, (200,), generator=random)]
    store = EvictingPool(1)
    begin(SubGen(delta=1e-3, recent_share=0.0), settings(1, budget=64), text, store, 200)
    kept = [i for i in held(store, 0) if 4 <= i < 192]
    assert len(kept) == 5 and len({tuple(text.keys[0, 0, i].tolist()) for i in kept}) == 5


def test_special_tokens_and_punctuation_come_from_the_tokenizer() -> None:
    class Tokenizer:
        words = ("<s>", ".", " ,", "a.", "\n", "", " ", "?!", "-", ".b")
        all_special_ids = (0,)

        def __len__(self) -> int:
            return len(self.words)

        def batch_decode(self, ids: list[list[int]]) -> list[str]:
            return ["".join(self.words[i] for i in row) for row in ids]

    made = FastGen.for_tokenizer(Tokenizer())
    assert made.special == (0,) and made.punctuation == (1, 2, 7, 8)


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
    assert all(decoder.fits(length) for length in range(20, 90)) and store.slot_of is None


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
        (lambda: FastGen((-1,)), "got special=.-1,., expected token ids"),
        (lambda: FastGen(mass=1.5), "got mass=1.5, expected a share of the attention from 0 to 1"),
        (lambda: FastGen(frequent=-0.1), "got frequent=-0.1, expected a share of the context from 0 to 1"),
        (lambda: FastGen(local=float("nan")), "got local=nan"),
        (lambda: Cascading(cascades=0), "got cascades=0, expected a whole number from 1 to 32"),
        (lambda: Cascading(decay=1.0), "got decay=1.0, expected a share from 0 to below 1"),
        (lambda: SubGen(delta=-1.0), "got delta=-1.0, expected a distance of at least 0"),
        (lambda: SubGen(recent_share=True), "got recent_share=True, expected a share of the budget from 0 to 1"),
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
