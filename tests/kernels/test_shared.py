"""`shared_attention` against its definition: near and distant parts, masks, padding, the gate, chunks of queries."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnpred.kernels import shared
from attnpred.kernels.dense import AttentionTerms
from attnpred.kernels.shared import Part, Split, shared_attention
from attnpred.kernels.shared_reference import shared_attention as reference

B, HQ, HKV, L = 2, 4, 2, 26
PLAIN = AttentionTerms(0.4)
ALL_TERMS = AttentionTerms(0.4, softcap=3.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))


def tensors(queries: int, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    """Return query, own keys, distant keys, values."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(B, HQ, queries, dim, generator=random)
    return (query, *(torch.randn(B, HKV, L, dim, generator=random) for _ in range(3)))


def causal(queries: int) -> Tensor:
    return torch.ones(1, queries, L, dtype=torch.bool).tril(L - queries)


def check(want: tuple[Tensor, ...], got: Any) -> None:
    for expected, found in zip(want, got, strict=False):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [8, 16])  # numba takes the second
@pytest.mark.parametrize("queries", [1, 7, L])
@pytest.mark.parametrize("terms", [PLAIN, ALL_TERMS], ids=["plain", "all terms"])
@pytest.mark.parametrize(("sinks", "recent"), [(3, 6), (0, 1), (4, 100), (30, 1)])
def test_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, dim: int, queries: int, terms: AttentionTerms, sinks: int, recent: int
) -> None:
    monkeypatch.setattr(shared, "CHUNK", 5)
    query, own, distant, values = tensors(queries, dim)
    got = shared_attention(query, [Part(0, own)], distant, values, L, Split(sinks, recent), terms)
    check(reference(query, own, distant, values, sinks, recent, terms), got)
    has_distant = sum(L - queries + i - recent >= sinks for i in range(queries))
    assert got.asked == got.kept.sum() == B * HKV * has_distant


@pytest.mark.parametrize("dim", [8, 16])
def test_a_single_softmax_over_mixed_keys_is_the_same(dim: int) -> None:
    query, own, distant, values = tensors(1, dim)
    mixed = torch.cat((own[:, :, :3], distant[:, :, 3 : L - 6], own[:, :, L - 6 :]), 2)
    want = torch.nn.functional.scaled_dot_product_attention(query, mixed, values, scale=0.4, enable_gqa=True)
    got = shared_attention(query, [Part(0, own)], distant, values, L, Split(3, 6), PLAIN)
    torch.testing.assert_close(got.output, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [8, 16])
@pytest.mark.parametrize("queries", [1, 9])
def test_only_the_near_tokens_of_its_own_keys_are_read(dim: int, queries: int) -> None:
    query, own, distant, values = tensors(queries, dim)
    start = L - queries - 6 + 1
    parts = [Part(0, own[:, :, :3]), Part(start, own[:, :, start:])]
    got = shared_attention(query, parts, distant, values, L, Split(3, 6), PLAIN)
    check(reference(query, own, distant, values, 3, 6, PLAIN), got)


@pytest.mark.parametrize("dim", [8, 16])
@pytest.mark.parametrize("queries", [1, 9])
def test_padded_rows_begin_later_and_see_no_padding(dim: int, queries: int) -> None:
    query, own, distant, values = tensors(queries, dim)
    first = torch.tensor([0, 13])
    mask = causal(queries) & (torch.arange(L) >= first[:, None])[:, None]
    got = shared_attention(query, [Part(0, own)], distant, values, L, Split(3, 6, first), PLAIN, mask)
    check(reference(query, own, distant, values, 3, 6, PLAIN, mask, first), got)


def test_a_row_that_may_attend_to_nothing_gets_zeros() -> None:
    query, own, distant, values = tensors(4)
    mask = causal(4).repeat(B, 1, 1)
    mask[1] = False
    got = shared_attention(query, [Part(0, own)], distant, values, L, Split(3, 6), PLAIN, mask)
    assert got.output.isfinite().all() and not got.output[1].any() and got.output[0].all()


@pytest.mark.parametrize("dim", [8, 16])
@pytest.mark.parametrize("queries", [1, 21])
def test_the_gate_leaves_the_distant_part_out_where_it_is_estimated_small(
    monkeypatch: pytest.MonkeyPatch, dim: int, queries: int
) -> None:
    monkeypatch.setattr(shared, "CHUNK", 10)
    query, own, distant, values = tensors(queries, dim)
    split = Split(3, 6)
    plain = shared_attention(query, [Part(0, own)], distant, values, L, split, PLAIN)
    estimate = plain.distant + torch.randn(plain.distant.shape, generator=torch.Generator().manual_seed(1))
    least = torch.sigmoid(plain.near - estimate).unflatten(1, (HKV, -1)).amin(2)
    tau = float(least[plain.kept].median()) + 1e-4  # which none of them is
    got = shared_attention(query, [Part(0, own)], distant, values, L, split, PLAIN, None, estimate, tau)
    check(reference(query, own, distant, values, 3, 6, PLAIN, None, None, estimate, tau), got)
    assert 0 < got.kept.sum() < got.asked == plain.asked, "some must be skipped and some not, or this proves nothing"
    never = shared_attention(query, [Part(0, own)], distant, values, L, split, PLAIN, None, estimate, 2.0)
    torch.testing.assert_close(never.output, plain.output)


def test_skipped_keys_are_not_read() -> None:
    query, own, distant, values = tensors(1)
    distant[1, 0] = torch.nan
    estimate = torch.full((B, HQ, 1), 100.0)
    estimate[1, :2] = -100.0
    got = shared_attention(query, [Part(0, own)], distant, values, L, Split(3, 6), PLAIN, None, estimate, 0.7)
    assert got.output.isfinite().all() and got.kept[:, :, 0].tolist() == [[True, True], [False, True]]
