"""The codes of digests, and every backend of `digest_shares` against the reference.

The bound. A query element is rounded to int8, in units of 1/127 of the largest, so it is wrong by at most half a unit, or
1/254 of the largest; it is multiplied with a code of at most 7.5 steps from the middle (what is the same for all vectors
changes no softmax). A logit is therefore wrong by at most e = r * 7.5 * STEP * max|q| / 254 and a share, up or down in
numerator and in denominator, by a factor of at most exp(2e). The torch backend rounds two products: high / 16, with a
signed byte of at most 128, and low - high / 16 with a code of at most 15: at most 8 / 7.5 * 17 / 16 of that.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.kernels import DIGEST, DIGEST_BACKENDS, digest_shares
from attnpred.kernels.digest import FLOOR, STEP, digest_shares_reference, pack, unpack
from attnpred.predictor.memory import Columns

FAST = [name for name in DIGEST_BACKENDS if name != "reference" and (name != "numba" or DIGEST == "numba")]


def problem(heads: int, group: int, blocks: int, vectors: int, half: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a query and codes as `Digest` passes them: a slice of what there is room for."""
    generator = torch.Generator().manual_seed(seed)
    stored = Columns(after=(vectors * half,), dtype=torch.int8)
    codes = pack(torch.randn(1, heads, blocks + 3, vectors, 2 * half, generator=generator))
    stored.reserve(1, heads, blocks + 3, codes.device).copy_(codes.flatten(3))
    used = stored.view()[:, :, :blocks].unflatten(3, (vectors, -1)).flatten(2, 3).flatten(0, 1)
    return torch.randn(heads, group, 2 * half, generator=generator), used


def bound(query: Tensor) -> float:
    worst = query.shape[-1] * 7.5 * STEP * query.abs().max().item() / 254
    return 2 * worst * (8 / 7.5) * (17 / 16) + 1e-4


@pytest.mark.parametrize("name", FAST)
@settings(deadline=None, max_examples=60)
@given(
    heads=st.integers(1, 5), group=st.integers(1, 9), blocks=st.integers(1, 200), vectors=st.sampled_from((1, 2, 4, 16)),
    half=st.integers(1, 70), scale=st.sampled_from((0.0, 0.05, 0.5, 5.0)), seed=st.integers(0, 99),
)  # fmt: skip
def test_backends_agree_with_the_reference(
    name: str, heads: int, group: int, blocks: int, vectors: int, half: int, scale: float, seed: int
) -> None:
    query, codes = problem(heads, group, blocks, vectors, half, seed)
    query = query * scale
    want, got = digest_shares_reference(query, codes, vectors), DIGEST_BACKENDS[name](query, codes, vectors)
    assert got.shape == (heads, blocks) and got.dtype == torch.float32
    assert (got - want).abs().max() <= bound(query)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("blocks", "vectors"), [(5000, 1), (1500, 2), (300, 16)])
def test_backends_agree_where_the_work_is_split(name: str, blocks: int, vectors: int) -> None:
    query, codes = problem(3, 4, blocks, vectors, 16)
    want, got = digest_shares_reference(query, codes, vectors), DIGEST_BACKENDS[name](query, codes, vectors)
    assert (got - want).abs().max() <= bound(query)
    assert (got - want).abs().mean() <= bound(query) / 8  # the bound is for the worst case


@pytest.mark.parametrize("name", DIGEST_BACKENDS if DIGEST == "numba" else ["reference", *FAST])
def test_shares_of_a_group_sum_to_its_size_and_never_fall_below_the_floor(name: str) -> None:
    query, codes = problem(2, 3, 400, 2, 16)
    shares = DIGEST_BACKENDS[name](query, codes, 2)
    torch.testing.assert_close(shares.exp().sum(1), torch.full((2,), 3.0), rtol=1e-3, atol=0)
    peaked = DIGEST_BACKENDS[name](query * 1000, codes, 2)  # all of the mass on a few: nothing overflows
    assert peaked.isfinite().all() and peaked.min() >= FLOOR - 1e-5


@pytest.mark.parametrize("name", FAST)
def test_what_lies_behind_the_columns_in_use_does_not_matter(name: str) -> None:
    query, codes = problem(3, 4, 33, 2, 16)
    before = DIGEST_BACKENDS[name](query, codes, 2)
    codes.as_strided((3, 3 * 32), (codes.stride(0), 1), 33 * 32).fill_(-128)
    assert torch.equal(DIGEST_BACKENDS[name](query, codes, 2), before)
    codes[2, 65].fill_(-128)
    assert not torch.equal(DIGEST_BACKENDS[name](query, codes, 2), before)


@pytest.mark.parametrize("name", FAST)
def test_no_blocks_give_no_shares(name: str) -> None:
    query, codes = problem(3, 4, 0, 2, 16)
    assert DIGEST_BACKENDS[name](query, codes, 2).shape == (3, 0)


@pytest.mark.parametrize("name", FAST)
def test_one_thread_gives_the_same(name: str) -> None:
    query, codes = problem(2, 4, 700, 2, 16)
    before, threads = DIGEST_BACKENDS[name](query, codes, 2), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(DIGEST_BACKENDS[name](query, codes, 2), before)
    finally:
        torch.set_num_threads(threads)


def test_the_backend_in_use_is_one_of_the_table() -> None:
    query, codes = problem(1, 4, 20, 2, 16)
    assert torch.equal(digest_shares(query, codes, 2), DIGEST_BACKENDS[DIGEST](query, codes, 2))


def test_packing_keeps_the_levels_and_rounds_the_rest_to_the_nearest() -> None:
    levels = (torch.arange(16) - 7.5) * STEP
    every = torch.cartesian_prod(levels, levels)  # all 256 codes
    torch.testing.assert_close(unpack(pack(every)), every)
    assert pack(every).unique().numel() == 256
    values = torch.linspace(-7.5 * STEP, 7.5 * STEP, 1000).view(-1, 10)
    assert (unpack(pack(values)) - values).abs().max() <= STEP / 2 + 1e-6


def test_packing_clamps_what_is_out_of_range() -> None:
    assert unpack(pack(torch.tensor([-100.0, 100.0]))).tolist() == pytest.approx([-7.5 * STEP, 7.5 * STEP])
