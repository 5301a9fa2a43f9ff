"""Every bad setting is one clear line: what was got, what was expected, what to do."""

import math
from pathlib import Path

import pytest

from attnpred.config import CacheConfig
from attnpred.errors import AttnpredError, ConfigError
from attnpred.policies.paper_cnn import PaperForecast
from attnpred.policies.predicted import Predicted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "got budget=0, expected a number of tokens"),
        ({"budget": -4}, "got budget=-4, expected a number of tokens"),
        ({"budget": 0.0}, "got budget=0.0"),
        ({"budget": math.nan}, "got budget=nan"),
        ({"budget": math.inf}, "got budget=inf, expected a number of tokens"),
        ({"budget": 10**400}, "got budget=a number of about 400 digits, expected a number of tokens"),
        ({"num_sink_tokens": 10**12}, "got num_sink_tokens=1000000000000, expected a whole number of at most 16777216"),
        ({"dense_layers": 10**12}, "got dense_layers=1000000000000, expected a whole number"),
        ({"layer_budgets": (1e300,)}, r"got layer_budgets=\(1e\+300,\), expected numbers above 0 and up to 1,000,000"),
        ({"strict": "yes"}, "got strict='yes', expected True or False"),
        ({"hysteresis": 10**400}, "got hysteresis=a number of about 400 digits, expected a number of at least 0"),
        ({"fast_limit": 1 << 63}, "got fast_limit=9223372036854775808, expected a number of bytes"),
        ({"budget": 1.5}, "got budget=1.5, expected a share of at most 1.0, or whole tokens: write 2 for tokens"),
        ({"budget": True}, "got budget=True"),
        ({"budget": "big"}, "got budget='big'"),
        ({"budget": 64}, r"got budget=64, expected at least 80 \(16 sink \+ 32 recent tokens \+ 2 blocks of 16\)"),
        ({"block_size": 24}, "got num_sink_tokens=16, expected a multiple of block_size=24: change one of the two"),
        ({"recent_window": 40, "block_size": 16}, "got recent_window=40, expected a multiple of block_size=16"),
        ({"block_size": -1}, "got block_size=-1, expected a whole number of at least 0"),
        ({"history": 2.5}, "got history=2.5, expected a whole number"),
        ({"calibration_interval": -1}, "got calibration_interval=-1"),
        ({"dense_layers": True}, "got dense_layers=True"),
        ({"dense_layers": (0, -1)}, r"got dense_layers=\(0, -1\), expected a whole number of at least 0, or numbers"),
        ({"dense_layers": "2"}, "got dense_layers='2'"),
        ({"offload": "tape"}, "got offload='tape', expected one of None, 'cpu', 'disk'$"),
        ({"offload": False}, "got offload=False, expected one of None, 'cpu', 'disk'$"),
        ({"offload": ["cpu"]}, r"got offload=\['cpu'\], expected one of"),
        ({"offload": "cpu", "offload_dtype": "int4"}, "got offload_dtype='int4', expected one of None, 'int8', 'fp8'$"),
        ({"offload_dir": "/tmp"}, "got offload_dir='/tmp' without offload, expected offload='cpu' or 'disk'$"),
        ({"offload_dtype": "int8"}, "got offload_dtype='int8' without offload, expected offload='cpu' or 'disk'$"),
        ({"host_limit": 5}, "got host_limit=5 without offload, expected offload='cpu' or 'disk'$"),
        ({"disk_limit": 0}, "got disk_limit=0 without offload, expected offload='cpu' or 'disk'$"),
        *(
            (
                {"offload": "disk", name: value},
                f"got {name}={value!r}, expected a number of bytes, or None for no limit$",
            )
            for name in ("fast_limit", "host_limit", "disk_limit")
            for value in (-1, 1.5, True, "1GB")
        ),
        ({"fast_limit": -1}, "got fast_limit=-1, expected a number of bytes"),
        *(
            ({"fetch_timeout": value}, f"got fetch_timeout={value!r}, expected seconds above 0 and up to 1,000,000$")
            for value in (0, -1.0, math.inf, math.nan, True, "60", None)
        ),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        CacheConfig(**settings)
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError | AttnpredError)


def test_defaults_are_those_of_the_evidence() -> None:
    config = CacheConfig()
    assert (config.block_size, config.num_sink_tokens, config.recent_window, config.history) == (0, 16, 32, 64)
    assert (config.calibration_interval, config.dense_layers, config.budget) == (None, 0, 1024)
    assert (Predicted.granularity, PaperForecast.granularity) == (4, 16)
    assert (PaperForecast.calibration, Predicted.calibration) == (5, 0)


def test_a_share_is_taken_of_the_context_and_never_too_small() -> None:
    config = CacheConfig(budget=0.25, block_size=16)
    assert config.budget_blocks(4096) == 64
    assert config.budget_blocks(300) == config.smallest_budget // 16
    assert CacheConfig(budget=1.0, block_size=16).budget_blocks(1001) == 63
    assert CacheConfig(budget=1000, block_size=16).budget_blocks(5000) == 62


@pytest.mark.parametrize(
    "settings",
    [
        {"offload": "cpu", "host_limit": 0, "offload_dtype": "fp8"},
        {
            "offload": "disk",
            "offload_dir": Path("cache"),
            "disk_limit": 1 << 40,
            "host_limit": 1,
            "offload_dtype": "int8",
        },
        {"fast_limit": 0},  # also without offload: fast memory is always there
        {"fetch_timeout": 1},
    ],
)
def test_good_offload_settings_stay_as_they_are(settings: dict[str, object]) -> None:
    config = CacheConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_nothing_is_offloaded_unless_asked_for() -> None:
    config = CacheConfig()
    names = ("offload", "offload_dir", "offload_dtype", "fast_limit", "host_limit", "disk_limit")
    assert [getattr(config, name) for name in names] == [None] * len(names)
    assert config.fetch_timeout == 60


def test_dense_layers_are_the_first_or_those_named() -> None:
    first, named = CacheConfig(dense_layers=2), CacheConfig(dense_layers=(0, 3))
    assert [first.is_dense_layer(i) for i in range(5)] == [True, True, False, False, False]
    assert [named.is_dense_layer(i) for i in range(5)] == [True, False, False, True, False]
    assert CacheConfig(dense_layers=[0, 3]) == named and hash(named) == hash(CacheConfig(dense_layers=(0, 3)))
