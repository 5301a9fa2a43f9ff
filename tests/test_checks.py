"""Numbers from outside have bounds, and what is beyond them is named in one short line."""

import math
from typing import Any

import pytest

from attnpred import checks
from attnpred.errors import ConfigError, PredictorError


def test_what_is_within_bounds_comes_back() -> None:
    assert checks.whole("n", 3, 3, 3) == 3
    assert checks.seed((1 << 63) - 1) == (1 << 63) - 1
    assert checks.temperature(0) == 0.0 and checks.temperature(0.01) == 0.01 and checks.temperature(100) == 100.0
    assert checks.is_finite(1.5) and checks.is_finite((1 << 64) - 1)


@pytest.mark.parametrize("value", [2, -1, True, 3.0, "3", None, math.nan])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(PredictorError, match=rf"got n={value!r}, expected a whole number of at least 3"):
        checks.whole("n", value, 3, error=PredictorError)


@pytest.mark.parametrize(("value", "said"), [(10, "10"), (10**400, "a number of about 400 digits")])
def test_what_is_too_large_is_refused(value: int, said: str) -> None:
    with pytest.raises(ConfigError, match=f"got n={said}, expected a whole number of at most 9"):
        checks.whole("n", value, 0, 9)


@pytest.mark.parametrize("value", [-1, 1 << 63, 10**5000], ids=["negative", "64 bits", "cannot be printed"])
def test_a_seed_has_at_most_63_bits(value: int) -> None:
    with pytest.raises(ConfigError, match="got seed="):
        checks.seed(value)


@pytest.mark.parametrize("value", [-1, 1e-320, 0.009, 101, math.nan, math.inf, "0", True, None])
def test_a_temperature_can_be_sampled_with(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"got temperature=.*, expected 0 for the likeliest token, or 0.01 to 100"):
        checks.temperature(value)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 10**400, True, "1", None])
def test_what_is_not_finite(value: Any) -> None:
    assert not checks.is_finite(value)
