"""Probabilities and pooling by their definition."""

import math

import torch

from attnpred.kernels.dense import AttentionTerms, pool_blocks, probabilities


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


def test_probabilities_are_causal_softmax() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 22, 8)
    for terms in (AttentionTerms(0.3), AttentionTerms(0.3, 1.5, torch.randn(4))):
        got = probabilities(query, keys, terms)
        for b in range(2):
            for h in range(4):
                for j in range(5):
                    want = torch.tensor(naive_probability(query, keys, terms, b, h, j))
                    torch.testing.assert_close(got[b, h, j], want, rtol=1e-4, atol=1e-6)


def test_a_fully_masked_query_gets_zeros_not_nan() -> None:
    mask = torch.tensor([[[False, False], [True, False]]])
    weights = probabilities(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), AttentionTerms(1.0), mask)
    assert weights[0, 0].tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_pooling_fills_the_last_block_with_zeros() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.25])
    torch.testing.assert_close(pool_blocks(weights, 2), torch.tensor([0.4, 0.3, 0.25]))
    torch.testing.assert_close(pool_blocks(weights, 2, total=True), torch.tensor([0.5, 0.5, 0.25]))
