"""History rows and dense attention equal loops written from their descriptions."""

import math

import torch

from attnpred.kernels import dense
from attnpred.kernels.dense import AttentionTerms, attention_rows, dense_attention, pool_blocks, probabilities


def naive_probability(
    query: torch.Tensor, keys: torch.Tensor, terms: AttentionTerms, b: int, h: int, j: int
) -> list[float]:
    """Softmax over the keys that query j (of the last Q) may see, one by one."""
    length, group = keys.shape[2], query.shape[1] // keys.shape[1]
    logits = []
    for i in range(length - query.shape[2] + j + 1):
        logit = float(query[b, h, j] @ keys[b, h // group, i]) * terms.scale
        logits.append(logit if terms.softcap is None else terms.softcap * math.tanh(logit / terms.softcap))
    extra = math.exp(float(terms.sinks[h])) if terms.sinks is not None else 0.0
    total = sum(map(math.exp, logits)) + extra
    return [math.exp(x) / total for x in logits] + [0.0] * (length - len(logits))


def test_rows_are_causal_block_maxima_over_the_group() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 22, 8)
    for terms in (AttentionTerms(0.3), AttentionTerms(0.3, 1.5, torch.randn(4))):
        got = attention_rows(query, keys, terms, None, block_size=4, selecting=2)
        assert got.shape == (2, 2, 5, 6)
        for b in range(2):
            for s in range(2):
                for j in range(5):
                    heads = [naive_probability(query, keys, terms, b, h, j) for h in (2 * s, 2 * s + 1)]
                    want = [max(max(p[n * 4 : n * 4 + 4]) for p in heads) for n in range(6)]
                    torch.testing.assert_close(got[b, s, j], torch.tensor(want), rtol=1e-4, atol=1e-6)


def test_chunks_of_queries_change_nothing(monkeypatch: object) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    terms = AttentionTerms(0.3, 2.0)
    rows = attention_rows(query, keys, terms, None, block_size=4, selecting=4)
    out = dense_attention(query, keys, values, terms, None)
    monkeypatch.setattr(dense, "CHUNK_ELEMENTS", 300)  # type: ignore[attr-defined]
    torch.testing.assert_close(attention_rows(query, keys, terms, None, block_size=4, selecting=4), rows)
    torch.testing.assert_close(dense_attention(query, keys, values, terms, None), out)


def test_dense_attention_equals_torch_without_extras() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(
        dense_attention(query, keys, values, AttentionTerms(0.3), None), want, rtol=1e-4, atol=1e-5
    )


def test_a_fully_masked_query_gets_zeros_not_nan() -> None:
    mask = torch.tensor([[[False, False], [True, False]]])
    weights = probabilities(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), AttentionTerms(1.0), mask)
    assert weights[0, 0].tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_pooling_fills_the_last_block_with_zeros() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.25])
    torch.testing.assert_close(pool_blocks(weights, 2), torch.tensor([0.4, 0.3, 0.25]))
    torch.testing.assert_close(pool_blocks(weights, 2, total=True), torch.tensor([0.5, 0.5, 0.25]))
