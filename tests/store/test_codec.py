"""Codecs: `Exact` keeps every bit, the others keep their bounds and lose once; `checks` sees what changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpred.errors import ConfigError, ShapeError
from attnpred.store.codec import CODECS, Codec, Exact, Fp8, Int8, checks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSSY: list[type[Codec]] = [Int8, Fp8]
TOP = {Int8: 127, Fp8: 448}
SHAPES = st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))  # n, P, D, Dv


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def random_bits(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    size = shape[-1] * dtype.itemsize
    return torch.randint(0, 256, (*shape[:-1], size), generator=generator, dtype=torch.uint8).view(dtype)


def rows(codec: type[Codec], numbers: Tensor) -> Tensor:
    """Encode and decode `numbers` [n, D] as keys of blocks of one token; the values are the same numbers negated."""
    coder = codec(1, numbers.shape[1], numbers.shape[1], numbers.dtype)
    keys, values = coder.decode(coder.encode(numbers[:, None], -numbers[:, None]))
    assert torch.equal(keys.isnan(), values.isnan()) and torch.equal(keys.nan_to_num(), -values.nan_to_num())
    return keys[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_exact_keeps_every_bit(dtype: torch.dtype, shape: tuple[int, int, int, int], seed: int) -> None:
    n, block, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    keys, values = random_bits(generator, dtype, n, block, dim), random_bits(generator, dtype, n, block, value_dim)
    codec = Exact(block, dim, value_dim, dtype)
    got = codec.decode(codec.encode(keys, values))
    assert codec.is_exact and not any(other.is_exact for other in LOSSY)
    assert torch.equal(bits(got[0]), bits(keys)) and torch.equal(bits(got[1]), bits(values))
    assert got[0].dtype == got[1].dtype == dtype


@pytest.mark.parametrize("name", CODECS)
@given(shape=SHAPES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_units(name: str | None, shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype) -> None:
    n, block, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(block, dim, n, generator=generator).to(dtype).permute(2, 0, 1)  # any strides
    values = torch.randn(n, value_dim, block, generator=generator).to(dtype).transpose(1, 2)
    codec = CODECS[name](block, dim, value_dim, dtype)
    size = dtype.itemsize if name is None else 1
    used = block * (dim + value_dim) * size + (0 if name is None else 4 * block)
    units = codec.encode(keys, values)
    assert units.dtype == torch.uint8 and units.shape == (n, codec.unit_bytes) and units.is_contiguous()
    assert codec.unit_bytes % 8 == 0 and 0 <= codec.unit_bytes - used < 8 and not units[:, used:].any()
    got = codec.decode(units)
    assert got[0].shape == keys.shape and got[1].shape == values.shape and {x.dtype for x in got} == {dtype}
    for i in range(n):  # a unit depends on its block alone
        assert torch.equal(codec.encode(keys[i : i + 1], values[i : i + 1])[0], units[i])
    within = torch.zeros(n + 1, 2 * codec.unit_bytes, dtype=torch.uint8)  # units may lie apart from each other
    within[1:, codec.unit_bytes :] = units
    again = codec.decode(within[1:, codec.unit_bytes :])
    assert torch.equal(again[0], got[0]) and torch.equal(again[1], got[1])


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_size(codec: type[Codec], dtype: torch.dtype) -> None:
    for dim in (64, 80, 96, 128):
        assert codec(16, dim, dim, dtype).unit_bytes <= 0.53 * Exact(16, dim, dim, dtype).unit_bytes


def spread(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return rows of numbers from the largest to the smallest that `dtype` has; some of their numbers are much smaller."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    exponents = torch.linspace(
        torch.log2(torch.tensor(info.smallest_normal)) - 6, torch.log2(torch.tensor(info.max)), 4000
    )
    numbers = (torch.rand(4000, 12, generator=generator) * 2 - 1) * 2 ** -(torch.arange(12) * 1.3)
    numbers[:, 0] = 1
    return (numbers * (exponents.double().exp2()[:, None])).clamp(-info.max, info.max).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LOSSY)
def test_bounds(codec: type[Codec], dtype: torch.dtype) -> None:
    numbers = spread(dtype)
    got = rows(codec, numbers).double()
    numbers = numbers.double()
    scale = (numbers.abs().amax(1, keepdim=True) / TOP[codec] * (1 + 2**-8)).clamp_min(2.0**-126)
    bound = scale / 2 if codec is Int8 else (numbers.abs() / 16).maximum(scale / 1024)
    info = torch.finfo(dtype)
    rounding = (numbers.abs() * info.eps).clamp_min(info.smallest_normal * info.eps)  # of the result to dtype
    assert got.isfinite().all() and ((got - numbers).abs() <= bound + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("seed", range(3))
def test_second_time_changes_no_bit(codec: type[Codec], dtype: torch.dtype, seed: int) -> None:
    once = rows(codec, spread(dtype, seed))
    assert torch.equal(bits(rows(codec, once)), bits(once))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", LOSSY)
def test_second_time_changes_no_bit_whatever_the_largest_number(codec: type[Codec], dtype: torch.dtype) -> None:
    largest = torch.arange(2**15, dtype=torch.int16).view(dtype)
    largest = largest[largest.isfinite()][:, None]
    generator = torch.Generator().manual_seed(0)
    rest = ((torch.rand(len(largest), 15, generator=generator) * 2 - 1) * largest).to(dtype)
    once = rows(codec, torch.cat((largest, rest), 1))
    assert torch.equal(bits(rows(codec, once)), bits(once))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LOSSY)
def test_zeros_and_numbers_that_are_none(codec: type[Codec], dtype: torch.dtype) -> None:
    numbers = torch.ones(4, 8, dtype=dtype)
    numbers[0], numbers[1, 3], numbers[2, 3] = 0, torch.inf, torch.nan
    got = rows(codec, numbers)
    assert torch.equal(got[0], numbers[0]) and got[1:3].isnan().all()
    assert torch.equal(got[3], rows(codec, numbers[3:])[0]) and got[3].isfinite().all()


def test_every_code_of_fp8_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]  # NaN, which no code of a finite row is
    wanted = codes.view(torch.float8_e4m3fn).float()
    units = torch.zeros(len(codes), 8, dtype=torch.uint8)
    units[:, :4] = torch.ones(2, dtype=torch.bfloat16).view(torch.uint8)
    units[:, 4] = units[:, 5] = codes
    keys, values = Fp8(1, 1, 1, torch.float32).decode(units)
    assert torch.equal(bits(keys.flatten()), bits(wanted)) and torch.equal(bits(values.flatten()), bits(wanted))


@pytest.mark.parametrize("name", CODECS)
def test_no_gradients_are_recorded(name: str | None) -> None:
    def record(_: Tensor) -> None:
        raise AssertionError

    codec = CODECS[name](2, 3, 3, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(record, record):
        keys, values = codec.decode(codec.encode(*torch.ones(2, 1, 2, 3, requires_grad=True)))
    assert not keys.requires_grad and not values.requires_grad


def test_wrong_arguments_are_named() -> None:
    codec, block = Exact(2, 3, 4, torch.float16), torch.zeros(5, 2, 3, dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"got values of shape \(5, 2, 3\), expected \[5, 2, 4\]"):
        codec.encode(block, block)
    with pytest.raises(
        ShapeError, match=r"got keys of torch.float16 and values of torch.float32, expected torch.float16"
    ):
        codec.encode(block, torch.zeros(5, 2, 4))
    with pytest.raises(ShapeError, match=r"got units of shape \(5, 2, 3\), expected \[any, 32\]"):
        codec.decode(block)
    with pytest.raises(ConfigError, match=r"got torch.float64 to compress"):
        Int8(2, 3, 4, torch.float64)


# Check values


def unit(words: int, seed: int = 0) -> Tensor:
    return random_bits(torch.Generator().manual_seed(seed), torch.uint8, 1, words * 8)


def splitmix64(index: int) -> int:
    z = index * 0x9E3779B97F4A7C15 % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_checks_are_what_they_were() -> None:
    """Files hold them, so they must not change: the same in Python integers, and one figure."""
    data = unit(5)
    total = splitmix64(1) - 2**63
    for i, word in enumerate(data.view(torch.int32)[0].tolist()):
        total += word * (splitmix64(i + 2) - 2**63)
    high = total % 2**64 >> 32
    assert checks(data).tolist() == [high - 2**32 * (high >> 31)]
    assert checks(torch.arange(16, dtype=torch.uint8)[None]).tolist() == [890196358]


@pytest.mark.parametrize("words", [1, 2, 33])
def test_a_changed_bit_is_seen(words: int) -> None:
    changed = unit(words).expand(words * 64, -1).clone()
    index = torch.arange(words * 64)
    changed[index, index // 8] ^= (1 << index % 8).to(torch.uint8)
    assert (checks(changed) != checks(unit(words))).all()


@pytest.mark.parametrize("bit", [0, 31, 32, 62, 63])
def test_the_same_bit_changed_in_two_words_is_seen(bit: int) -> None:
    """So a broken line of a bus shows, which changes one bit of every word that passes."""
    first, second = torch.triu_indices(33, 33, 1)
    changed = unit(33).expand(len(first), -1).clone()
    for index in (first, second):
        changed[torch.arange(len(first)), index * 8 + bit // 8] ^= 1 << bit % 8
    assert (checks(changed) != checks(unit(33))).all()


def test_swapped_words_are_seen() -> None:
    first, second = torch.triu_indices(33, 33, 1)
    swapped, index = unit(33).view(torch.int64).expand(len(first), -1).clone(), torch.arange(len(first))
    swapped[index, first], swapped[index, second] = swapped[index, second], swapped[index, first]
    assert (checks(swapped.view(torch.uint8)) != checks(unit(33))).all()


@pytest.mark.parametrize("words", [2, 10, 1000])
def test_checks_are_the_same_without_numba(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    units = random_bits(torch.Generator().manual_seed(0), torch.uint8, 70, words * 4)
    native = checks(units)
    monkeypatch.setattr("attnpred.store.codec._HAS_NUMBA", False)
    assert torch.equal(checks(units), native)


@pytest.mark.parametrize("words", [2, 1000, 40_000])
def test_checks_of_many_units_are_those_of_each(words: int) -> None:
    units = random_bits(torch.Generator().manual_seed(0), torch.uint8, 70, words * 4)
    assert checks(units).tolist() == [int(checks(units[i : i + 1])) for i in range(70)]


def test_checks_of_much_alike_are_different() -> None:
    counting = torch.zeros(20_000, 4, dtype=torch.int64)
    counting[:, 2] = torch.arange(20_000)
    found = checks(counting.view(torch.uint8))
    assert found.dtype == torch.int32 and found.unique().numel() == 20_000
    assert found[0] != 0  # lost data beside a lost check value
    assert checks(counting[:0].view(torch.uint8)).shape == (0,)
