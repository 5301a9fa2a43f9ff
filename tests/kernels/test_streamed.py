"""Attention in pieces equals the probabilities by their definition, however it is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.kernels import streamed
from attnpred.kernels.dense import AttentionTerms, pool_blocks, pool_heads, probabilities
from attnpred.kernels.streamed import StreamedAttention, StreamedRows

BLOCK = 4


def both(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    terms: AttentionTerms,
    mask: torch.Tensor | None,
    piece: int,
    total: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    attention = StreamedAttention(query, keys.shape[2], terms, mask)
    rows = StreamedRows(query, keys.shape[2], terms, mask, block_size=BLOCK, total=total)
    for start in range(0, keys.shape[2], piece):
        attention.add(start, keys[:, :, start : start + piece], values[:, :, start : start + piece])
        rows.add(start, keys[:, :, start : start + piece])
    return attention.result(), rows.result()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2), kv_heads=st.integers(1, 2), group=st.integers(1, 3), queries=st.integers(1, 9),
    past=st.integers(0, 30), piece=st.integers(1, 6), chunk=st.sampled_from([60, 1 << 24]),
    extra=st.sampled_from(["plain", "softcap", "sinks", "both"]), padded=st.booleans(), dim=st.sampled_from([8, 16]),
    total=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_pieces_equal_the_definition(
    batch: int, kv_heads: int, group: int, queries: int, past: int, piece: int, chunk: int, extra: str, padded: bool,
    dim: int, total: bool, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    length = past + queries
    query = torch.randn(batch, kv_heads * group, queries, 8, generator=generator)
    keys = torch.randn(batch, kv_heads, length, 8, generator=generator)
    values = torch.randn(batch, kv_heads, length, dim, generator=generator)
    sinks = torch.randn(kv_heads * group, generator=generator) if extra in ("sinks", "both") else None
    terms = AttentionTerms(0.4, 1.5 if extra in ("softcap", "both") else None, sinks)
    mask = None
    if padded:
        causal = torch.ones(queries, length, dtype=torch.bool).tril(past)
        first = torch.randint(0, length, (batch, 1, 1), generator=generator)
        mask = causal & (torch.arange(length) >= first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "CHUNK_ELEMENTS", chunk)
        output, rows = both(query, keys, values, terms, mask, piece * BLOCK, total)
    weights = probabilities(query, keys, terms, mask)
    want = weights @ values.repeat_interleave(group, 1)
    torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows, pool_blocks(weights, BLOCK, total=total), rtol=1e-4, atol=1e-6)


def test_rows_take_the_maximum_over_the_group() -> None:
    torch.manual_seed(0)
    query, keys, terms = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 22, 8), AttentionTerms(0.3)
    rows = StreamedRows(query, 22, terms, None, block_size=BLOCK)
    rows.add(0, keys)
    want = pool_heads(pool_blocks(probabilities(query, keys, terms), BLOCK), 2)
    torch.testing.assert_close(rows.result(2), want, rtol=1e-4, atol=1e-6)


def test_half_precision_stays_close_over_many_pieces() -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, heads, size, 64) for heads, size in ((4, 3), (2, 512), (2, 512)))
    want, _ = both(query, keys, values, AttentionTerms(0.2), None, 512)
    half = [x.bfloat16() for x in (query, keys, values)]
    got, _ = both(half[0], half[1], half[2], AttentionTerms(0.2), None, 32)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).norm() / want.norm()) < 0.01
