"""HiP: a beam over a tree of blocks finds what one key per stretch can find, in logarithmically many keys."""

import math
from dataclasses import replace
from itertools import pairwise

import torch

from attnpred.policies.base import View
from attnpred.policies.hip import HiP
from attnpred.policies.select import zone_at
from attnpred.predictor.centre_keys import UNSEEN, CentreKeys
from tests.policies.layer import CONFIG, GROUP, KV_HEADS, Layer, P, Text, chosen, kept

PROMPT, STEPS = 141, 9


def search(text: Text, head: int, t: int, first: int, last: int, free: int) -> set[int]:
    """Return the blocks that the search ends with, with lists of stretches."""
    queries = text.queries[0, head * GROUP : (head + 1) * GROUP, t].tolist()
    keys = text.keys[0, head].tolist()

    def score(stretch: tuple[int, int]) -> float:
        key = keys[(stretch[0] + stretch[1] - 1) // 2 * P + P // 2]
        return max(sum(a * b for a, b in zip(query, key, strict=True)) for query in queries)

    edges = [first + i * (last - first) // free for i in range(free + 1)]
    stretches = list(pairwise(edges))
    while any(stop - start > 1 for start, stop in stretches):
        halves = []
        for start, stop in stretches:
            middle = (start + stop) // 2
            halves += [half for half in ((start, middle), (middle, stop)) if half[1] > half[0]]
        stretches = sorted(halves, key=score, reverse=True)[:free]
    return {start for start, _ in stretches}


def test_against_a_loop() -> None:
    text = Text(PROMPT + STEPS)
    layer = Layer(HiP()).prompt(text, PROMPT).steps(text, PROMPT, PROMPT + STEPS)
    for step, got in enumerate(layer.blocks):
        t = PROMPT + step
        zone = zone_at(CONFIG, t + 1)
        for head in range(KV_HEADS):
            wanted = search(text, head, t, zone.sinks, zone.first_recent, zone.free)
            assert chosen(got)[head] == wanted | kept(t + 1) and len(wanted) == zone.free


def searched(blocks: int, free: int, keys: torch.Tensor | None = None) -> tuple[CentreKeys, torch.Tensor]:
    memory = CentreKeys(1)
    memory.seal(torch.randn(1, 1, blocks, 8, generator=torch.Generator().manual_seed(0)) if keys is None else keys)
    memory.look(torch.ones(1, 1, 8), 1.0, 1)
    return memory, memory.search(0, blocks, free)


def test_it_looks_at_logarithmically_many_keys() -> None:
    free, looked = 8, {}
    for blocks in (8, 9, 16, 17, 1 << 8, 1 << 12, 1 << 16):
        memory, scores = searched(blocks, free)
        looked[blocks] = memory.scored
        rounds = math.ceil(math.log2(blocks / free))
        assert looked[blocks] == (2 * rounds + 1) * free
        assert int((scores > UNSEEN).sum()) == free
    assert looked[1 << 16] < 300 < 1 << 16 and looked[1 << 16] - looked[1 << 12] == looked[1 << 12] - looked[1 << 8]


def test_where_neighbours_are_alike_it_finds_the_best() -> None:
    """Logits that rise towards one place: the beam keeps the stretches around it."""
    place = 37
    logits = -(torch.arange(128.0) - place).abs()
    keys = torch.zeros(1, 1, 128, 8)
    keys[0, 0, :, 0] = logits
    _, scores = searched(128, 4, keys)
    assert place in (scores[0, 0] > UNSEEN).nonzero().flatten().tolist()


def test_a_block_that_no_middle_shows_is_missed() -> None:
    """That is the method: a lone key beside the middle of every stretch that holds it is never looked at."""
    found = 0
    for place in range(128):
        keys = torch.zeros(1, 1, 128, 8) - torch.arange(128.0)[:, None] * 1e-3
        keys[0, 0, place] = 9.0
        _, scores = searched(128, 4, keys)
        found += bool(scores[0, 0, place] > UNSEEN)
    assert 0 < found < 64


def test_the_bytes_it_reads_are_counted() -> None:
    text = Text(PROMPT + 1, batch=2)
    layer = Layer(HiP(), replace(CONFIG, budget=9 * P)).prompt(text, PROMPT).step(text, PROMPT)
    memory = layer.decoder.memory
    assert memory.scored == (2 * 3 + 1) * 5  # 33 blocks between sinks and recent window, five of them chosen
    assert layer.decoder.counts.digest_bytes == 2 * KV_HEADS * memory.scored * 8 * 4


def test_a_zone_without_room_is_no_search() -> None:
    memory, _ = searched(30, 4)
    memory.scored = 0
    zone = replace(zone_at(CONFIG, 120), free=0)
    memory.look(torch.ones(1, 1, 8), 1.0, 1)
    assert (HiP().score(View(memory, zone, 0, True)) == UNSEEN).all() and memory.scored == 0
