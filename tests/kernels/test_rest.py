"""The estimate of the rest: every backend is its loop, and with true numbers the result is full attention."""

import pytest
import torch

from attnpred.kernels import REST_BACKENDS
from attnpred.kernels.rest import RestTerms, add_rest_reference

FAST = [name for name in REST_BACKENDS if name != "reference"]


def terms_for(batch: int, heads: int, kv_heads: int, dim: int, width: int) -> RestTerms:
    return RestTerms(
        torch.randn(batch, heads),
        torch.rand(batch, heads),
        torch.randn(batch, kv_heads, dim) / dim**0.5,
        torch.randn(batch, heads, width),
        torch.rand(batch, heads),
    )


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4, 2, 8, 8), (2, 6, 2, 16, 24), (3, 2, 2, 5, 7)])
def test_a_backend_is_the_loop(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    torch.manual_seed(0)
    batch, heads, _, dim, width = shape
    terms, query = terms_for(*shape), torch.randn(batch, heads, dim).to(dtype)
    output, normaliser = torch.randn(batch, heads, width).to(dtype), torch.randn(batch, heads)
    terms.level[0, 0] = -1e4  # of which nothing is known
    wanted = add_rest_reference(output, query, normaliser, terms)
    found = REST_BACKENDS[name](output, query, normaliser, terms)
    assert found[0].dtype == dtype
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(found[0], wanted[0], **near)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-6)
    assert found[1][0, 0] == 0 and torch.equal(found[0][0, 0], output[0, 0])


@pytest.mark.parametrize("name", REST_BACKENDS)
def test_with_the_true_sum_and_output_it_is_full_attention(name: str) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 1, 8), torch.randn(40, 8), torch.randn(40, 6)
    logits = (query[0, 0] @ keys.T) * 0.5
    full = torch.softmax(logits, -1) @ values
    chosen, rest = slice(0, 12), slice(12, 40)
    own = torch.softmax(logits[chosen], -1) @ values[chosen]
    left = torch.softmax(logits[rest], -1) @ values[rest]
    terms = RestTerms(
        logits[rest].logsumexp(-1).view(1, 1),
        torch.zeros(1, 1),
        torch.zeros(1, 1, 8),
        left[None, None],
        torch.ones(1, 1),
    )
    found, share = REST_BACKENDS[name](own[None, None], query, logits[chosen].logsumexp(-1).view(1, 1), terms)
    torch.testing.assert_close(found[0, 0], full)
    torch.testing.assert_close(share[0, 0], torch.softmax(logits, -1)[rest].sum())
