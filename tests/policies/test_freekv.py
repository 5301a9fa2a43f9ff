"""FreeKV: a head keeps to the choice of the last query, unless its queries have turned away from it."""

import math

import pytest
import torch
from torch import Tensor

from attnpred.errors import ConfigError
from attnpred.policies.freekv import FreeKV
from attnpred.policies.quest import Quest
from tests.policies.layer import HEADS, KV_HEADS, SCALE, Layer, P, Text, best, chosen

PROMPT, STEPS = 101, 14
GROUP = HEADS // KV_HEADS


def slow_text(batch: int = 1, seed: int = 0) -> Text:
    """Queries that turn slowly, by less or by more: each is a mixture of the last one and a new one."""
    text = Text(PROMPT + STEPS, batch, seed)
    share = torch.rand(batch, HEADS, PROMPT + STEPS, 1, generator=torch.Generator().manual_seed(seed + 1))
    for t in range(1, PROMPT + STEPS):
        old, new = text.queries[:, :, t - 1], text.queries[:, :, t]
        text.queries[:, :, t] = (1 - share[:, :, t]) * old + share[:, :, t] * new
    return text


def cosine(one: Tensor, other: Tensor) -> float:
    a, b = one.tolist(), other.tolist()
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def bound_scores(text: Text, row: int, head: int, t: int, length: int) -> list[float]:
    """Return the shares that the bounds of each full block give, of the group's queries at token `t`, with loops."""
    totals = [0.0] * -(-length // P)
    for h in range(head * GROUP, (head + 1) * GROUP):
        query, logits = text.queries[row, h, t].tolist(), []
        for block in range(length // P):
            keys = text.keys[row, head, block * P : block * P + P].tolist()
            logits.append(SCALE * sum(max(q * k[d] for k in keys) for d, q in enumerate(query)))
        norm = sum(math.exp(x) for x in logits)
        for block, logit in enumerate(logits):
            totals[block] += math.exp(logit) / norm
    return totals


@pytest.mark.parametrize("tau", [0.8, 0.95])
def test_against_a_loop(tau: float) -> None:
    text = slow_text()
    layer = Layer(FreeKV(tau)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    turns = 0
    for step, got in enumerate(layer.blocks):
        t = PROMPT + step
        for head in range(KV_HEADS):
            group = range(head * GROUP, (head + 1) * GROUP)
            alike = sum(cosine(text.queries[0, h, t], text.queries[0, h, t - 1]) for h in group) / GROUP
            turns += alike < tau
            scores = bound_scores(text, 0, head, t if alike < tau else t - 1, t + 1)
            assert chosen(got)[head] == best(scores, t + 1)
    assert 0 < turns < STEPS * KV_HEADS


def test_the_ends_of_tau_are_the_last_query_and_this_one() -> None:
    text = slow_text()
    quest = Layer(Quest()).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS).blocks
    always = Layer(FreeKV(1)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS).blocks
    assert [chosen(x) for x in always] == [chosen(x) for x in quest]
    never = Layer(FreeKV(-1)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS).blocks
    assert [chosen(x) for x in never] != [chosen(x) for x in quest]


def test_after_a_crop_it_chooses_with_the_query() -> None:
    text = slow_text()
    layer = Layer(FreeKV(-1)).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + 6)
    layer.pool.crop(PROMPT)
    layer.decoder.crop(PROMPT)
    layer.step(text, PROMPT)
    assert all(
        got == best(bound_scores(text, 0, head, PROMPT, PROMPT + 1), PROMPT + 1)
        for head, got in enumerate(chosen(layer.blocks[-1]))
    )


@pytest.mark.parametrize("tau", [-1.1, 2, float("nan"), True, "much"])
def test_a_bad_tau_is_one_line(tau: float) -> None:
    with pytest.raises(ConfigError, match="expected a cosine") as caught:
        FreeKV(tau)
    assert "\n" not in str(caught.value)
