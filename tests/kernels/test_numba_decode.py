"""The numba kernels equal the fp32 reference for all that they serve; pieces of a dense call add up to the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred import kernels
from attnpred.kernels import decoding
from attnpred.kernels import torch as plain
from attnpred.kernels.dense import AttentionTerms, probabilities
from attnpred.kernels.reference import sparse_decode as reference
from attnpred.kernels.streamed import StreamedAttention

numba_decode = pytest.importorskip("attnpred.kernels.numba_decode", reason="numba is an extra", exc_type=ImportError)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Shapes that the kernel serves: dimensions in sixteens, values of another one, any group, several items per head."""
    block = draw(st.sampled_from([4, 8, 12, 16, 64]))
    blocks = draw(st.integers(1, 300 // block + 1))
    length = draw(st.integers((blocks - 1) * block + 1, blocks * block))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4, 5, 9]))
    dim, value_dim = draw(st.sampled_from([16, 48, 64])), draw(st.sampled_from([16, 32, 80]))
    batch, heads = draw(st.integers(1, 2)), kv_heads * group
    selecting = heads if draw(st.booleans()) else kv_heads
    chosen = draw(st.integers(1, blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    order = torch.rand(batch, selecting, blocks, generator=generator).argsort(-1)[..., :chosen]
    if chosen > 1 and draw(st.booleans()):
        order[..., -1] = -1
    capacity = blocks + draw(st.integers(0, 2))
    mask = torch.rand(batch, length, generator=generator) > 0.3
    for s in range(selecting):  # every head may attend to something
        mask.scatter_(1, (order[:, s, :1] * block).clamp(0, length - 1), True)
    slots = torch.randperm(capacity, generator=generator)
    dtype = draw(st.sampled_from(DTYPES))
    return {
        "query": torch.randn(batch, heads, dim, generator=generator).to(dtype),
        "keys": torch.randn(batch, kv_heads, capacity * block, dim, generator=generator).to(dtype),
        "values": torch.randn(batch, kv_heads, capacity * block, value_dim, generator=generator).to(dtype),
        "selection": order,
        "length": length,
        "block_size": block,
        "scale": draw(st.sampled_from([1.0, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": torch.randn(heads, generator=generator) if draw(st.booleans()) else None,
        "mask": mask if draw(st.booleans()) else None,
        "slots": torch.where(order < 0, 0, slots[order.clamp_min(0)]) if draw(st.booleans()) else None,
    }


@given(problem=problems())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_equals_reference(problem: dict[str, object]) -> None:
    assert numba_decode.serves(problem["query"], problem["keys"], problem["values"], problem["block_size"])
    found, wanted = numba_decode.sparse_decode(**problem), reference(**problem)
    coarse = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[problem["query"].dtype]
    torch.testing.assert_close(found[0], wanted[0], rtol=coarse, atol=coarse)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 1024, 1040, 2500])
@pytest.mark.parametrize(("softcap", "sinks", "masked"), [(None, False, False), (3.0, True, True)])
def test_dense_pieces_are_the_same_bits_as_all_at_once(
    dtype: torch.dtype, length: int, softcap: float | None, sinks: bool, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 6, 1, 32, generator=generator).to(dtype)
    stored = torch.full((2, 2, 2, 3000, 32), torch.nan, dtype=dtype)  # nothing may be read past the end
    stored[..., :length, :] = torch.randn(2, 2, 2, length, 32, generator=generator).to(dtype)
    keys, values = stored[:, :, :, :length]
    terms = AttentionTerms(0.2, softcap, torch.randn(6, generator=generator) if sinks else None)
    mask = torch.rand(2, 1, length, generator=generator) > 0.4 if masked else None
    if mask is not None:
        mask[..., 0] = True
        mask = mask.transpose(1, 2).contiguous().transpose(1, 2)  # nor need it lie in one piece
    at_once, in_pieces = (StreamedAttention(query, length, terms, mask, 512) for _ in range(2))
    at_once.add(0, keys, values)
    for start in range(0, length, 512):
        piece = slice(start, start + 512)
        in_pieces.add(start, keys[:, :, piece].contiguous(), values[:, :, piece].contiguous())
    assert at_once.parts
    assert torch.equal(at_once.result(), in_pieces.result())
    weights = probabilities(query, keys, terms, mask).view(2, 2, 3, length)
    wanted = (weights @ values.float()).view(2, 6, 1, 32)
    coarse = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(at_once.result().float(), wanted, rtol=coarse, atol=coarse)


@pytest.mark.parametrize("name", kernels.DENSE_BACKENDS)
def test_dense_decode_equals_full_attention(name: str) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 6, 32), torch.randn(2, 3, 1100, 32), torch.randn(2, 3, 1100, 32)
    output, normaliser = kernels.DENSE_BACKENDS[name](query, keys, values, scale=0.3)
    k, v = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
    logits = (query[:, :, None] @ k.transpose(-1, -2))[:, :, 0] * 0.3
    torch.testing.assert_close(normaliser, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, (logits.softmax(-1)[:, :, None] @ v)[:, :, 0], rtol=1e-4, atol=1e-5)


def problem_of(**changes: object) -> dict[str, object]:
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 64, 16)
    given = {"query": torch.randn(1, 4, 16), "keys": keys, "values": keys.clone(), "length": 60, "block_size": 8}
    return given | {"scale": 1.0, "selection": torch.tensor([[[0, 5], [2, 7]]])} | changes


def test_blocks_outside_the_selection_are_not_read() -> None:
    problem = problem_of()
    before = numba_decode.sparse_decode(**problem)
    for head, kept in enumerate(problem["selection"][0].tolist()):
        for block in set(range(8)) - set(kept):
            problem["keys"][0, head, block * 8 : block * 8 + 8] = torch.nan
            problem["values"][0, head, block * 8 : block * 8 + 8] = torch.nan
    for got, want in zip(numba_decode.sparse_decode(**problem), before, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_what_is_not_a_number_is_not_swallowed(name: str) -> None:
    problem = problem_of()
    problem[name][0, 0, 3, 5] = torch.nan
    assert numba_decode.sparse_decode(**problem)[0].isnan().any()


def test_a_row_that_may_attend_to_nothing_gets_zeros() -> None:
    problem = problem_of(mask=torch.zeros(1, 60, dtype=torch.bool))
    output, maxima, normaliser = numba_decode.sparse_decode(**problem)
    assert not output.any() and not maxima.any() and bool((normaliser == -torch.inf).all())


def test_same_bits_for_any_number_of_threads() -> None:
    problem = problem_of(selection=torch.stack([torch.randperm(7) for _ in range(2)])[None])
    problem["keys"] = problem["values"] = torch.randn(1, 2, 640, 16)
    problem["selection"] = torch.stack([torch.randperm(75) for _ in range(2)])[None]
    problem["length"] = 620
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(numba_decode.sparse_decode(**problem)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_not_served_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(plain, "sparse_decode", lambda *args, **named: taken.append("torch"))
    monkeypatch.setattr(numba_decode, "sparse_decode", lambda *args, **named: taken.append("numba"))
    odd, gradient = torch.randn(1, 2, 64, 20), torch.randn(1, 4, 16, requires_grad=True)
    for changes, wanted in (
        ({}, "numba"),
        ({"keys": odd, "values": odd}, "torch"),
        ({"block_size": 6}, "torch"),
        ({"keys": torch.randn(1, 2, 64, 32)[..., ::2]}, "torch"),
        ({"keys": torch.randn(1, 2, 64, 16).double()}, "torch"),
        ({"query": gradient}, "torch"),
    ):
        decoding.sparse_decode(**problem_of(**changes))
        assert taken.pop() == wanted, changes
    monkeypatch.setattr(decoding, "HAS_NUMBA", False)
    decoding.sparse_decode(**problem_of())
    assert taken == ["torch"]


def test_rounds_to_bfloat16_as_torch_does() -> None:
    import numpy as np

    from attnpred.kernels.numba_tools import narrow

    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int64).int()
    bits[:4000] = (bits[:4000] & ~0xFFFF) | 0x8000  # exactly between two
    numbers = torch.cat((bits.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38])))
    found = torch.empty(numbers.numel(), dtype=torch.bfloat16)
    narrow(numbers.numpy().astype(np.float32), found.data_ptr())
    torch.testing.assert_close(found, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)
