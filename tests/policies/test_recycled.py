"""Recycled Attention: a full step, then its best blocks and what came later, until the next full step."""

import math

import pytest
import torch

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.policies.recycled import Recycled
from tests.policies.layer import CONFIG, DIM, HEADS, KV_HEADS, SCALE, Layer, P, Text, best, chosen
from tests.policies.test_freekv import cosine

PROMPT, STEPS = 61, 21
GROUP = HEADS // KV_HEADS


def attention(text: Text, h: int, t: int, blocks: set[int] | None) -> tuple[dict[int, float], list[float]]:
    """Return probabilities by token, and the output, of query head `h` at `t` over `blocks`, None for all."""
    tokens = [i for i in range(t + 1) if blocks is None or i // P in blocks]
    query, keys = text.queries[0, h, t].tolist(), text.keys[0, h // GROUP].tolist()
    exps = {i: math.exp(SCALE * sum(a * b for a, b in zip(query, keys[i], strict=True))) for i in tokens}
    total = sum(exps.values())
    weights = {i: x / total for i, x in exps.items()}
    values = text.values[0, h // GROUP].tolist()
    return weights, [sum(w * values[i][d] for i, w in weights.items()) for d in range(DIM)]


class Naive:
    """One kv head, from the description, with dictionaries of blocks."""

    def __init__(self, text: Text, head: int, stride: int, similarity: float | None) -> None:
        self.text, self.group = text, range(head * GROUP, (head + 1) * GROUP)
        self.stride, self.similarity, self.last = stride, similarity, PROMPT - 1
        self.row = self.blocks_of(PROMPT - 1, None)
        self.later: dict[int, float] = {}

    def blocks_of(self, t: int, blocks: set[int] | None) -> dict[int, float]:
        row: dict[int, float] = {}
        for h in self.group:
            for token, weight in attention(self.text, h, t, blocks)[0].items():
                row[token // P] = max(row.get(token // P, 0.0), weight)
        return row

    def is_full(self, t: int) -> bool:
        if (t - self.last) % self.stride:
            return False
        if self.similarity is None:
            return True
        heads = range(HEADS)  # the layer decides
        queries = self.text.queries[0]
        return sum(cosine(queries[h, t], queries[h, self.last]) for h in heads) / HEADS < self.similarity

    def step(self, t: int) -> tuple[set[int], bool]:
        if self.is_full(t):
            self.row, self.later, self.last = self.blocks_of(t, None), {}, t
            return set(range(t // P + 1)), True
        known = self.row | self.later
        selection = best([known.get(block, 0.0) for block in range(t // P + 1)], t + 1)
        for block, weight in self.blocks_of(t, selection).items():
            if block not in self.row:
                self.later[block] = max(self.later.get(block, 0.0), weight)
        return selection, False


@pytest.mark.parametrize(("stride", "similarity"), [(7, None), (20, None), (3, 0.1), (1, -0.1)])
def test_against_a_loop(stride: int, similarity: float | None) -> None:
    text = Text(PROMPT + STEPS)
    layer = Layer(Recycled(stride, similarity)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    naive = [Naive(text, head, stride, similarity) for head in range(KV_HEADS)]
    full = 0
    for step, got in enumerate(layer.blocks):
        wanted = [one.step(PROMPT + step) for one in naive]
        assert chosen(got) == [blocks for blocks, _ in wanted], step
        full += wanted[0][1]
        for h in range(HEADS):
            output = attention(text, h, PROMPT + step, wanted[h // GROUP][0])[1]
            assert layer.outputs[step][0, h].tolist() == pytest.approx(output, abs=1e-5)
    assert full == (STEPS // stride if similarity is None else full) and 0 < full < STEPS


def test_between_full_steps_nothing_comes_back() -> None:
    """Only what the last full step chose, and blocks that were recent then or came later; what dropped out stays out."""
    text = Text(PROMPT + STEPS)
    layer = Layer(Recycled(STEPS + 1)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    first = chosen(layer.blocks[0])
    for before, after in zip(layer.blocks, layer.blocks[1:], strict=False):
        for old, new, start in zip(chosen(before), chosen(after), first, strict=True):
            opened = {block for block in new if block > max(old)}
            assert new - old <= opened and all(block in start or block > PROMPT // P for block in new)
    assert any(chosen(layer.blocks[-1])[head] != first[head] for head in range(KV_HEADS))


def test_a_full_step_is_counted_as_one() -> None:
    text, stride = Text(PROMPT + 6), 3
    layer = Layer(Recycled(stride)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + 6)
    token = KV_HEADS * 2 * DIM * 4
    read = [(PROMPT + n) * token if n % stride == 0 else layer.blocks[n - 1].shape[2] * P * token for n in range(1, 7)]
    for n in (3, 6):  # whole blocks are read, the last of them is not full
        read[n - 1] += -(PROMPT + n) % P * token
    assert layer.decoder.counts.bytes_read == sum(read)


def test_rows_of_a_batch_have_full_steps_of_their_own() -> None:
    text = Text(PROMPT + STEPS, batch=3)
    policy = Recycled(2, 0.0)
    together = Layer(policy).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    whole = []
    for row in range(3):
        one = Text(PROMPT + STEPS)
        one.queries, one.keys, one.values = (x[row : row + 1] for x in (text.queries, text.keys, text.values))
        alone = Layer(policy).prompt(one, PROMPT).steps(one, PROMPT, PROMPT + STEPS)
        for got, want in zip(together.outputs, alone.outputs, strict=True):
            torch.testing.assert_close(got[row : row + 1], want)
        whole.append([blocks.shape[2] > CONFIG.budget_blocks(200) for blocks in alone.blocks])
    assert any(len(set(steps)) == 2 for steps in zip(*whole, strict=True))


def test_after_a_crop_the_next_step_is_a_full_one() -> None:
    text = Text(PROMPT + STEPS)
    layer = Layer(Recycled(50)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + 6)
    layer.pool.crop(PROMPT)
    layer.decoder.crop(PROMPT)
    layer.steps(text, PROMPT, PROMPT + 2)
    assert [blocks.shape[2] > CONFIG.budget_blocks(200) for blocks in layer.blocks] == [False] * 6 + [True, False]


def test_calibration_rows_count_as_full_ones() -> None:
    """They are what a full step would have remembered."""
    text = Text(PROMPT + STEPS)
    config = CacheConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__} | {"calibration_interval": 2})
    layer = Layer(Recycled(50, 0.5), config).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + 3)
    want = Naive(text, 0, 50, None).blocks_of(PROMPT + 1, None)
    assert chosen(layer.blocks[2])[0] == best(
        [want.get(block, 0.0) for block in range(-(-(PROMPT + 3) // P))], PROMPT + 3
    )


@pytest.mark.parametrize(
    "wrong",
    [{"stride": 0}, {"stride": 2.5}, {"stride": True}, {"similarity": 1.5}, {"similarity": float("nan")}],
)
def test_a_bad_setting_is_one_line(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"got {next(iter(wrong))}=") as caught:
        Recycled(**wrong)
    assert "\n" not in str(caught.value)
