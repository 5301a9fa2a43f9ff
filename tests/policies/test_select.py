"""A selection holds sinks, recent blocks and the best-scored blocks between, never more than the budget, none twice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.config import CacheConfig
from attnpred.policies.select import select_blocks, zone_at


@given(
    length=st.integers(1, 700),
    block=st.sampled_from([1, 4, 16]),
    sink=st.integers(0, 3),
    recent=st.integers(1, 4),
    extra=st.integers(0, 12),
    share=st.one_of(st.none(), st.floats(0.02, 1.0)),
    seed=st.integers(0, 50),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_selection_against_a_loop(
    length: int, block: int, sink: int, recent: int, extra: int, share: float | None, seed: int
) -> None:
    budget = share if share is not None else (sink + recent + 2 + extra) * block
    config = CacheConfig(budget=budget, block_size=block, num_sink_tokens=sink * block, recent_window=recent * block)
    zone = zone_at(config, length)
    scores = torch.rand(1, 2, zone.blocks, generator=torch.Generator().manual_seed(seed))
    selection = select_blocks(scores, zone)
    blocks = -(-length // block)
    for head in range(2):
        ids = selection[0, head].tolist()
        assert len(set(ids)) == len(ids) and all(0 <= i < blocks for i in ids)
        kept = set(range(min(sink, blocks))) | {
            token // block for token in range(max(0, length - recent * block), length)
        }
        assert kept <= set(ids)
        allowed = config.budget_blocks(length)
        assert len(ids) <= max(allowed, 1) and len(ids) * block <= max(allowed * block, config.smallest_budget)
        chosen, left = set(ids) - kept, set(range(blocks)) - set(ids)
        if chosen and left:
            assert min(scores[0, head, i] for i in chosen) >= max(scores[0, head, i] for i in left)
        if left:
            # The budget is used up, but for the one block that a context ending on a block would not need.
            assert allowed - len(ids) <= 1


def test_left_padding_moves_the_sinks_and_chooses_nothing_before_them() -> None:
    config = CacheConfig(budget=7 * 4, block_size=4, num_sink_tokens=8, recent_window=8)
    zone = zone_at(config, 80)
    scores = torch.arange(20.0).flip(0).expand(2, 1, 20)
    selection = select_blocks(scores, zone, torch.tensor([0, 10]))
    assert set(selection[0, 0].tolist()) == {0, 1, 2, 3, 18, 19}
    assert set(selection[1, 0].tolist()) == {10, 11, 12, 13, 18, 19}


def test_a_row_with_too_few_blocks_gets_none_ids() -> None:
    config = CacheConfig(budget=8 * 4, block_size=4, num_sink_tokens=4, recent_window=8)
    zone = zone_at(config, 80)
    selection = select_blocks(torch.rand(1, 1, 20), zone, torch.tensor([16]))
    assert sorted(selection[0, 0].tolist()) == [-1, -1, -1, 16, 17, 18, 19]
