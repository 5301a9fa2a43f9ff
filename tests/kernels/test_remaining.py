"""Attention over what eviction has left is the reference's, query by query, with all that a model may add to it."""

import pytest
import torch

from attnpred.kernels import reference
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.remaining import attend_blocks

P, LENGTH, QUERIES = 4, 46, 7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_reference(masked: bool, sinks: bool, softcap: float | None, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, QUERIES, 8, generator=random).to(dtype)
    keys = torch.randn(2, 2, 9 * P, 8, generator=random).to(dtype)
    values = torch.randn(2, 2, 9 * P, 6, generator=random).to(dtype)
    selection = torch.tensor([[[0, 3, 7, -1, 9, 10, 11], [1, 2, 5, 8, 9, 10, 11]]]).repeat(2, 1, 1)
    slots = torch.stack([torch.randperm(9, generator=random)[:7] for _ in range(4)]).view(2, 2, 7)
    extra = torch.randn(4, generator=random) if sinks else None
    mask = (torch.rand(2, QUERIES, LENGTH, generator=random) < 0.8) if masked else None
    if mask is not None:  # each query sees itself, and nothing behind it
        mask = mask.tril(LENGTH - QUERIES) | torch.eye(QUERIES, LENGTH).bool().roll(LENGTH - QUERIES, 1)
    terms = AttentionTerms(0.5, softcap, extra)
    got, rows = attend_blocks(query, keys, values, selection, slots, LENGTH - QUERIES, terms, mask, P)
    for q in range(QUERIES):
        length = LENGTH - QUERIES + q + 1
        want, maxima, _ = reference.sparse_decode(
            query[:, :, q], keys, values, selection, length, block_size=P, scale=0.5, softcap=softcap, sinks=extra,
            mask=None if mask is None else mask[:, q], slots=slots,
        )  # fmt: skip
        torch.testing.assert_close(got[:, :, q], want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        torch.testing.assert_close(rows[:, :, q], maxima, rtol=1e-4, atol=1e-6)


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    selection = torch.arange(3)[None, None]
    parts = (torch.randn(1, 1, 3, 8), torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 8))
    mask = torch.ones(1, 3, 12, dtype=torch.bool)
    mask[:, 1] = False
    output, rows = attend_blocks(*parts, selection, selection, 9, AttentionTerms(1.0), mask, P)
    assert not output[:, :, 1].any() and not rows[:, :, 1].any() and output[:, :, 2].any()
