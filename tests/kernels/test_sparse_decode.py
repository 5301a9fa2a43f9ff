"""Every kernel backend equals the fp32 reference, reads only what is selected, and is full attention over all blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpred.kernels import DECODE_BACKENDS
from attnpred.kernels.decoding import HAS_NUMBA, numba_serves
from attnpred.kernels.reference import sparse_decode as reference

PLAIN = [name for name in DECODE_BACKENDS if name != "numba"]
"""Those that take any shape; `test_numba_decode` has the other, with the shapes that it serves."""


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    """Random shapes, odd on purpose: partly filled last block, ids of -1, optional mask, softcap and sinks."""
    block, blocks = draw(st.sampled_from([1, 4, 5, 16])), draw(st.integers(1, 6))
    length = draw(st.integers((blocks - 1) * block + 1, blocks * block))
    kv_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    batch, heads = draw(st.integers(1, 2)), kv_heads * group
    selecting = heads if draw(st.booleans()) else kv_heads
    chosen = draw(st.integers(1, blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    order = torch.rand(batch, selecting, blocks, generator=generator).argsort(-1)[..., :chosen]
    if chosen > 1 and draw(st.booleans()):
        order[..., -1] = -1
    capacity = (blocks + draw(st.integers(0, 2))) * block
    mask = torch.rand(batch, length, generator=generator) > 0.3
    mask.scatter_(1, (order[:, 0, :1] * block).clamp(0, length - 1), True)
    for s in range(selecting):  # every head may attend to something
        mask.scatter_(1, (order[:, s, :1] * block).clamp(0, length - 1), True)
    return {
        "query": torch.randn(batch, heads, dim, generator=generator),
        "keys": torch.randn(batch, kv_heads, capacity, dim, generator=generator),
        "values": torch.randn(batch, kv_heads, capacity, dim, generator=generator),
        "selection": order,
        "length": length,
        "block_size": block,
        "scale": draw(st.sampled_from([1.0, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": torch.randn(heads, generator=generator) if draw(st.booleans()) else None,
        "mask": mask if draw(st.booleans()) else None,
    }


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "reference"])
@given(problem=problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_backend_equals_reference(name: str, problem: dict[str, object]) -> None:
    for got, want in zip(DECODE_BACKENDS[name](**problem), reference(**problem), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_all_blocks_selected_is_full_attention(name: str) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 6, 8), torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8)
    selection = torch.randperm(5).expand(2, 3, 5)
    got, _, _ = DECODE_BACKENDS[name](query, keys, values, selection, 37, block_size=8, scale=0.5)
    k, v = keys[:, :, :37].repeat_interleave(2, 1), values[:, :, :37].repeat_interleave(2, 1)
    want = torch.nn.functional.scaled_dot_product_attention(query[:, :, None], k, v, scale=0.5)[:, :, 0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_blocks_outside_the_selection_are_not_read(name: str) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 4, 8), torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    selection = torch.tensor([[[0, 5], [2, 7]]])
    before = DECODE_BACKENDS[name](query, keys, values, selection, 60, block_size=8, scale=1.0)
    for head, kept in enumerate(selection[0].tolist()):
        for block in set(range(8)) - set(kept):
            keys[0, head, block * 8 : block * 8 + 8] = torch.nan
            values[0, head, block * 8 : block * 8 + 8] = torch.nan
    after = DECODE_BACKENDS[name](query, keys, values, selection, 60, block_size=8, scale=1.0)
    for got, want in zip(after, before, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    keys[0, 0, 0] = torch.nan
    assert DECODE_BACKENDS[name](query, keys, values, selection, 60, block_size=8, scale=1.0)[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_fp32_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(*shape).to(dtype) for shape in ((1, 2, 64), (1, 1, 48, 64), (1, 1, 48, 64)))
    selection = torch.tensor([[[0, 2]]])
    got = DECODE_BACKENDS["torch"](query * 4, keys, values, selection, 48, block_size=16, scale=0.125)
    want = reference(query * 4, keys, values, selection, 48, block_size=16, scale=0.125)
    assert got[0].dtype == dtype
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODE_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_heads_may_be_one_memory_in_which_each_has_its_own_slots(name: str, dtype: torch.dtype) -> None:
    """As `EvictingPool` gives it where heads keep different numbers of blocks: a view with strides of 0."""
    random = torch.Generator().manual_seed(0)
    batch, kv_heads, block, dim = 2, 3, 4, 16
    memory = [torch.randn(40 * block, dim, generator=random).to(dtype) for _ in range(2)]
    slots = torch.randperm(40, generator=random)[: batch * kv_heads * 6].view(batch, kv_heads, 6)
    ids = torch.stack([torch.randperm(9, generator=random)[:6] for _ in range(6)]).view(batch, kv_heads, 6)
    selection = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -1)
    query = torch.randn(batch, 2 * kv_heads, dim, generator=random).to(dtype)
    shown = [x.expand(batch, kv_heads, -1, -1) for x in memory]
    own = [torch.zeros(batch, kv_heads, 9, block, dim, dtype=dtype) for _ in range(2)]
    for one, x in zip(own, memory, strict=True):
        for b in range(batch):
            for h in range(kv_heads):
                one[b, h, ids[b, h]] = x.view(40, block, dim)[slots[b, h]]
    got = DECODE_BACKENDS[name](query, *shown, selection, 34, block_size=block, scale=0.3, slots=slots)
    want = reference(query, *(x.flatten(2, 3) for x in own), selection, 34, block_size=block, scale=0.3)
    for found, right in zip(got, want, strict=True):
        slack = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, right, rtol=slack, atol=slack)
    assert numba_serves(query, *shown, block) == HAS_NUMBA  # so a decode step takes the fast way there
