"""Products of a few rows with matrices, packed or not: the kernel says what the definition says."""

import pytest
import torch
from torch import Tensor

from attnpred.errors import ShapeError
from attnpred.kernels.linear import BITS, Packed, pack, product, unpack

pytest.importorskip("numba")
SIZES = [(576, 96), (97, 48), (5, 32), (4, 2080), (130, 64)]
"""Rows and width: whole fours and groups, and what falls short of them."""


def products(weights: list[Packed | Tensor], x: Tensor, biases: list[Tensor | None]) -> Tensor:
    from attnpred.kernels.numba_linear import Matrices

    return Matrices(weights, biases, x.dtype).product(x)


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_a_packed_number_is_the_nearest_of_its_group(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(size) * torch.logspace(-3, 3, size[0])[:, None]
    weight[0] = 0
    packed = pack(weight, BITS[name], at_once=64)
    again = unpack(packed)
    assert again.shape == weight.shape and torch.equal(again[0], weight[0])
    padded = torch.nn.functional.pad(weight, (0, -size[1] % 32)).unflatten(1, (-1, 32))
    spread = padded.abs().amax(-1) / 127 if name == "int8" else (padded.amax(-1) - padded.amin(-1)) / 15
    step = spread.repeat_interleave(32, 1)[:, : size[1]]
    slack = 1e-3 * weight.abs().amax()  # scales and offsets are rounded to fp16
    assert ((again - weight).abs() <= 0.51 * step + torch.minimum(slack, 0.05 * step + 1e-3 * weight.abs())).all()
    assert far(again, weight) < (0.01 if name == "int8" else 0.1)
    assert torch.equal(unpack(packed, 4, 5), again[4:5])
    assert far(again, unpack(pack(again, BITS[name]))) < 1e-3, "packed again it is what it was"


@pytest.mark.parametrize("vectors", [1, 3, 4, 8])
@pytest.mark.parametrize("name", [*BITS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_says_what_the_definition_says(name: str | None, dtype: torch.dtype, vectors: int) -> None:
    torch.manual_seed(1)
    for rows, width in SIZES:
        plain = torch.randn(rows, width).to(dtype)
        weight = plain if name is None else pack(plain, BITS[name])
        x, bias = torch.randn(vectors, width).to(dtype), torch.randn(rows).to(dtype)
        x[:, :: width // 7] *= 300  # models have such inputs
        wanted = product(x, weight, bias)
        found = products([weight], x, [bias])
        assert found.shape == wanted.shape and found.dtype == dtype
        assert far(found, wanted) < (1e-4 if dtype == torch.float32 else 4e-3), (rows, width)


def test_matrices_of_one_input_are_one_call() -> None:
    torch.manual_seed(2)
    plain = [torch.randn(rows, 64) for rows in (96, 7, 2000)]
    x = torch.randn(2, 64)
    for weights in ([pack(one, 8) for one in plain], [pack(one, 4) for one in plain], plain):
        biases = [None, torch.randn(7), None]
        wanted = torch.cat([product(x, *pair) for pair in zip(weights, biases, strict=True)], 1)
        assert far(products(list(weights), x, list(biases)), wanted) < 5e-5


def test_an_input_without_end_is_seen_in_the_output() -> None:
    weight = torch.randn(32, 64)
    x = torch.full((1, 64), 0.0)
    assert torch.equal(products([pack(weight, 8)], x, [None]), torch.zeros(1, 32))
    x[0, 3] = float("nan")
    for number in ("nan", "inf"):
        x[0, 3] = float(number)
        for given in (pack(weight, 8), pack(weight, 4), weight):
            assert not products([given], x, [None]).isfinite().any()


def test_what_cannot_be_multiplied_is_refused() -> None:
    from attnpred.kernels.numba_linear import Matrices

    with pytest.raises(ShapeError, match=r"got a matrix of 3 rows of 32 numbers, expected at least 4 rows"):
        Matrices([torch.randn(3, 32)], [None], torch.float32)
    with pytest.raises(ShapeError, match=r"got a matrix of 8 rows of 40 numbers, expected .* whole sixteens"):
        Matrices([torch.randn(8, 40)], [None], torch.float32)
    with pytest.raises(ShapeError, match=r"got 9 rows of 32 numbers, expected 1 to 8 rows of 32"):
        products([torch.randn(8, 32)], torch.randn(9, 32), [None])
