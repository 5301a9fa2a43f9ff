"""What the Triton kernels have to do, wherever they run: `test_triton.py` runs this on a GPU or in the interpreter.

Scratch memory is NaN before it is written, and so is all of the cache that may not be attended to. Tiles and programs
are made so small that small tensors are cut as large ones would be.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnpred.kernels import digest, reference, stream, triton_decode, triton_select, triton_tools
from attnpred.kernels.digest import STEP

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLACK = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Of outputs; block maxima and log-sum-exp are fp32 in any case."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Let `torch.empty` return NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class NoWaiting(TorchDispatchMode):
    """Within it, what would make the host wait for a GPU is an error."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return function(*args, **kwargs or {})


def on_device(kernel: Any, *arguments: Any, **named: Any) -> Any:
    """Return what `kernel` makes of these arguments, on the CPU."""

    def moved(found: Any) -> Any:
        return found.to(DEVICE) if isinstance(found, Tensor) else found

    arguments, named = tuple(map(moved, arguments)), {name: moved(value) for name, value in named.items()}
    waiting = torch.cuda.get_sync_debug_mode() if DEVICE.type == "cuda" else 0
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaiting():
            found = kernel(*arguments, **named)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode(waiting)
    return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found if found is None else found.cpu()


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Odd shapes; blocks lie in slots of their own, or where their ids say; tensors are views of larger ones."""
    block, blocks = draw(st.sampled_from([1, 4, 5, 16, 40])), draw(st.integers(1, 6))
    length = draw(st.integers((blocks - 1) * block + 1, blocks * block))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4, 17]))
    dim, value_dim = draw(st.sampled_from([1, 3, 16, 20])), draw(st.sampled_from([1, 5, 16]))
    shares = draw(st.sampled_from([part for part in (1, 2, 4, 17) if group % part == 0]))
    selecting, heads = kv_heads * shares, kv_heads * group
    dtype = draw(st.sampled_from(list(SLACK)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    chosen = draw(st.integers(1, blocks))
    ids = torch.rand(batch, selecting, blocks, generator=generator).argsort(-1)[..., :chosen]
    room = blocks + draw(st.integers(0, 2))
    slots = torch.rand(batch, selecting, room, generator=generator).argsort(-1)[..., :chosen]
    if draw(st.booleans()):
        ids[..., 1:][torch.rand(batch, selecting, chosen - 1, generator=generator) < 0.3] = -1
    own_slots = draw(st.booleans())
    places = slots if own_slots else ids
    mask = torch.rand(batch, length + 3, generator=generator) > 0.3 if draw(st.booleans()) else None
    if mask is not None:  # the reference wants every head to attend to something
        mask.scatter_(1, ids[:, :, 0] * block, True)
    keys = torch.randn(batch, kv_heads, room * block + 1, dim, generator=generator)
    values = torch.randn(batch, kv_heads, room * block + 1, value_dim, generator=generator)
    attended = torch.zeros(batch, kv_heads, room * block + 1, dtype=torch.bool)
    for b in range(batch):
        for s in range(selecting):
            for id_, place in zip(ids[b, s].tolist(), places[b, s].tolist(), strict=True):
                for i in range(block) if id_ >= 0 else ():
                    token = id_ * block + i
                    allowed = token < length and (mask is None or bool(mask[b, token]))
                    attended[b, s * kv_heads // selecting, place * block + i + 1] |= allowed
    keys[~attended], values[~attended] = torch.nan, torch.nan
    return {
        "query": torch.randn(batch, heads, dim, generator=generator).to(dtype),
        "keys": keys.to(dtype)[:, :, 1:],
        "values": values.to(dtype)[:, :, 1:],
        "selection": ids,
        "length": length,
        "block_size": block,
        "scale": draw(st.sampled_from([1.0, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": torch.randn(heads, generator=generator) * draw(st.sampled_from([1.0, 200.0]))
        if draw(st.booleans())
        else None,
        "mask": mask,
        "slots": slots if own_slots else None,
    }


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=SLACK[want[0].dtype])
    for one, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=32, deadline=None, derandomize=True)
@given(problem=problems(), tile=st.sampled_from([64, 1024, 16384]), processors=st.sampled_from([1, 4, 132]))
def test_sparse_decode_equals_the_reference(problem: dict[str, Any], tile: int, processors: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tools, "TILE_BYTES", tile)
        patch.setattr(triton_decode, "TILE_BYTES", tile)
        patch.setattr(triton_decode, "BLOCKS_AT_ONCE", 4)
        patch.setattr(triton_tools, "processors", lambda device: processors)
        close(on_device(triton_decode.sparse_decode, **problem), reference.sparse_decode(**problem))


def cache(blocks: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query of 4 heads, and keys and values of 2."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, blocks * 8, 16).unbind()
    return torch.randn(1, 4, 16), keys, values


def test_long_selections_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tools, "processors", lambda device: 132)
    query, keys, values = cache(blocks=300)
    selection = torch.stack([torch.randperm(300)[:280] for _ in range(2)])[None]
    blocks, per_block, splits, per_split = triton_tools.cut(2, 280, 8, 64, DEVICE)
    assert blocks * per_block <= 128 and 16 < splits <= triton_tools.MOST_SPLITS
    assert per_split % blocks == 0 and (splits - 1) * per_split < 280 <= splits * per_split
    named = {"block_size": 8, "scale": 0.5}
    got = on_device(triton_decode.sparse_decode, query, keys, values, selection, 2395, **named)
    close(got, reference.sparse_decode(query, keys, values, selection, 2395, **named))


def test_all_heads_may_be_one_memory() -> None:
    """With strides of 0, as a store gives it in which heads keep different numbers of blocks."""
    random = torch.Generator().manual_seed(0)
    memory = torch.randn(40 * 4, 8, generator=random)
    slots = torch.randperm(40, generator=random)[:36].view(2, 3, 6)
    selection = torch.arange(6).masked_fill(torch.arange(6) == 2, -1).expand(2, 3, -1)
    query, shown = torch.randn(2, 6, 8, generator=random), memory.to(DEVICE).expand(2, 3, -1, -1)
    arguments = (selection, 22), {"block_size": 4, "scale": 0.3, "slots": slots}
    got = on_device(triton_decode.sparse_decode, query, shown, shown, *arguments[0], **arguments[1])
    own = memory.expand(2, 3, -1, -1)
    close(got, reference.sparse_decode(query, own, own, *arguments[0], **arguments[1]))


def test_types_may_differ() -> None:
    query, keys, values = cache()
    query, keys, selection = query.half(), keys.bfloat16(), torch.tensor([[[3, 0], [7, 2]]])
    got = on_device(triton_decode.sparse_decode, query, keys, values, selection, 160, block_size=8, scale=0.5)
    close(got, reference.sparse_decode(query, keys, values, selection, 160, block_size=8, scale=0.5))


@pytest.mark.parametrize("chosen", [0, 3])
def test_who_may_attend_to_nothing_gets_zeros(chosen: int) -> None:
    query, keys, values = cache()
    selection = torch.full((1, 2, chosen), -1)
    for sinks in (None, torch.tensor([1.0, 2.0, 3.0, -4.0])):
        output, maxima, normaliser = on_device(
            triton_decode.sparse_decode, query, keys, values, selection, 160, block_size=8, scale=0.5, sinks=sinks
        )
        assert not output.any() and not maxima.any() and maxima.shape == (1, 2, chosen)
        torch.testing.assert_close(normaliser[0], torch.full((4,), -torch.inf) if sinks is None else sinks)


def test_a_nan_that_is_attended_to_is_seen() -> None:
    query, keys, values = cache()
    keys[0, 1, 8 * 7 + 3] = torch.nan
    selection = torch.tensor([[[3, 7], [7, 2]]])
    got = on_device(triton_decode.sparse_decode, query, keys, values, selection, 160, block_size=8, scale=0.5)
    assert got[0][0].isnan().all(-1).tolist() == [False, False, True, True]


def test_a_cache_of_more_numbers_than_32_bits_count(tmp_path: Path) -> None:
    apart = (1 << 30) + 8  # two of these are beyond; a file with holes, or memory of a GPU, holds them
    size, keys = 2 * apart + 1024, torch.randn(3, 1, 64, 16).half()
    if DEVICE.type == "cuda":
        stored = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    else:
        stored = torch.from_file(str(tmp_path / "cache"), shared=True, size=size, dtype=torch.float16)
    large = stored.as_strided((3, 1, 64, 16), (apart, apart, 16, 1))
    large.copy_(keys)
    query, selection = torch.randn(3, 2, 16).half(), torch.tensor([[[1, 0]], [[2, 3]], [[3, 1]]])
    named = {"block_size": 16, "scale": 0.3}
    got = on_device(triton_decode.sparse_decode, query, large, large, selection, 60, **named)
    close(got, reference.sparse_decode(query, keys, keys, selection, 60, **named))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3), group=st.sampled_from([1, 3, 4, 17]), blocks=st.integers(0, 12), half=st.sampled_from([1, 5, 16, 40]),
    vectors=st.sampled_from([1, 2, 3, 16]), scale=st.sampled_from([0.0, 0.5, 5.0, 1000.0]), seed=st.integers(0, 99),
    tiles=st.sampled_from([1, 2, 64]),
)  # fmt: skip
def test_digest_shares_equal_the_reference(
    rows: int, group: int, blocks: int, half: int, vectors: int, scale: float, seed: int, tiles: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = digest.pack(torch.randn(rows, (blocks + 2) * vectors, 2 * half, generator=generator))[:, : blocks * vectors]
    query = torch.randn(rows, group, 2 * half, generator=generator) * scale
    want = digest.digest_shares_reference(query, codes, vectors)
    rounding = 2**-11 if DEVICE.type == "cuda" else 1e-6  # tf32; fp32
    slack = 2 * 2 * half * 7.5 * STEP * float(query.abs().max()) * rounding + 1e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_select, "TILE_VECTORS", 16)
        patch.setattr(triton_select, "MOST_TILES", tiles)
        patch.setattr(triton_select, "BLOCKS_AT_ONCE", 16)
        got = on_device(triton_select.digest_shares, query, codes, vectors)
    assert got.shape == (rows, blocks) and got.dtype == torch.float32
    assert not blocks or (got - want).abs().max() <= slack


def memory(batch: int, heads: int, blocks: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an estimate, a past that is a part of something larger, and weights; what is not in use is NaN."""
    generator = torch.Generator().manual_seed(seed)
    estimate = torch.randn(batch, heads, blocks, generator=generator) * 3 - 5
    past = torch.full((batch, heads, 1, blocks + 5), torch.nan)
    past[..., : blocks + 1] = torch.randn(batch, heads, 1, blocks + 1, generator=generator).clamp(-2, 2) * 3 - 7
    return estimate, past, torch.randn(batch, heads, 4, generator=generator)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 50), st.integers(0, 99), st.data())
def test_weigh(batch: int, heads: int, blocks: int, seed: int, data: st.DataObject) -> None:
    estimate, past, weights = memory(batch, heads, blocks, seed)
    first = data.draw(st.integers(0, blocks))
    last = data.draw(st.integers(first, blocks))
    arguments = estimate, past, weights, torch.rand(last - first + 2)[2:], first, last, blocks + 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_select, "BLOCKS_AT_ONCE", 16)
        got = on_device(triton_select.weigh, *arguments)
    torch.testing.assert_close(got, stream.weigh(*arguments))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 50), st.booleans(), st.integers(0, 99), st.data())
def test_remember(batch: int, heads: int, blocks: int, padded: bool, seed: int, data: st.DataObject) -> None:
    estimate, past, weights = memory(batch, heads, blocks, seed)
    chosen = data.draw(st.integers(1, blocks))
    selection = torch.stack([torch.randperm(blocks + 1)[:chosen] for _ in range(batch * heads)]).view(batch, heads, -1)
    maxima = torch.rand(batch, heads, chosen) ** 20
    maxima[..., 0] = 0
    if padded:
        selection[..., 0], selection[..., 1:][selection[..., 1:] == 0] = -1, -1
    want, got, distance = past.clone(), past.to(DEVICE, copy=True), torch.rand(blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_select, "BLOCKS_AT_ONCE", 16)
        on_device(triton_select.remember, got, 0.03, blocks + 1, estimate, weights, distance, selection, maxima)
    stream.remember(want, 0.03, blocks + 1, estimate, weights, distance, selection, maxima)
    first = 1 if padded else 0  # where -1 writes is never looked at
    torch.testing.assert_close(got.cpu()[..., first:], want[..., first:], equal_nan=True, atol=1e-4, rtol=1e-4)
