"""What a cache will take: by hand for a small shape, growing with context and budget, and refused in one line."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attnpred.config import CacheConfig
from attnpred.errors import TierFullError
from attnpred.shapes import num_blocks
from attnpred.store.backing import Backing
from attnpred.store.codec import CODECS
from attnpred.store.estimate import (
    Estimate,
    LayerShape,
    admit,
    dense_slots,
    estimate,
    free_disk_bytes,
    free_host_bytes,
    readable,
    slots,
)
from attnpred.store.host import HostTier
from attnpred.store.tiered import TieredStore
from attnpred.telemetry import LayerCounts

GIB = 1 << 30
IN_MEMORY = CacheConfig(budget=64, block_size=4, num_sink_tokens=8, recent_window=8, dense_layers=0)
ON_CPU = replace(IN_MEMORY, offload="cpu")
ON_DISK = replace(IN_MEMORY, offload="disk")
LAYER = LayerShape(kv_heads=2, key_dim=8, value_dim=4, item_bytes=2, group=2, memory_bytes=700)  # 24 bytes per token
DENSE = replace(LAYER, is_dense=True)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1, 1),
        (63, 16),  # 16 blocks, all there are
        (64, 17),  # the next token opens the 17th, which is the spare
        (1000, 17),
        (100_000, 17),
    ],
)
def test_slots_are_the_budget_and_a_spare(tokens: int, expected: int) -> None:
    assert slots(ON_CPU, tokens) == expected


def test_the_spare_grows_with_the_budget() -> None:
    assert slots(replace(ON_CPU, budget=4 * 320), 1_000_000) == 320 + 11
    assert slots(replace(ON_CPU, budget=0.25), 4 * 1280 - 1) == 320 + 11


def test_a_selection_per_query_head_needs_slots_for_each() -> None:
    apart = replace(ON_CPU, per_query_head=True)
    assert (slots(ON_CPU, 1000, group=4), slots(apart, 1000), slots(apart, 1000, group=4)) == (17, 17, 64 + 3)
    assert slots(apart, 100, group=4) == 26  # there are no more blocks


def test_a_dense_layer_has_two_slots_once_the_budget_does_not_hold_it() -> None:
    assert [dense_slots(ON_CPU, tokens) for tokens in (1, 4, 5, 64, 65, 100_000)] == [1, 1, 2, 16, 2, 2]


def test_without_offload_everything_is_in_the_pool() -> None:
    found = estimate(IN_MEMORY, [LAYER, DENSE], 1000, batch=3)
    full = 2 * 3 * 2 * 1000 * 24
    assert found == Estimate(full=full, pool=full, memory=700, tables=0, buffers=0, host=0, disk=0)
    assert found.fast == full + 700


SEGMENT = (1 << 20) // 192 * 192  # whole records of two heads, of 4 * 24 bytes each


def test_every_part_by_hand() -> None:
    found = estimate(ON_CPU, [LAYER, DENSE], 1001, batch=3)
    heads, blocks = 3 * 2, 251
    assert found.full == 2 * heads * 1001 * 24
    assert found.pool == heads * (17 + 2) * 4 * 24
    assert found.memory == 700  # already of the whole batch, and a dense layer needs none
    assert found.tables == 2 * heads * blocks * 8 + heads * (17 + 2) * 8 + 2 * 3 * blocks * 20
    assert found.buffers == 3 * 3 * 2 * 1024 * 24
    assert (found.host, found.disk) == (2 * SEGMENT, 0)
    assert found.fast == found.pool + found.memory + found.tables + found.buffers
    assert found.as_dict() == {
        "full": found.full,
        "fast": found.fast,
        "pool": found.pool,
        "memory": 700,
        "tables": found.tables,
        "buffers": found.buffers,
        "host": 2 * SEGMENT,
        "disk": 0,
    }


def test_the_largest_layer_decides_about_the_buffers_and_disk_has_a_queue() -> None:
    large = replace(LAYER, kv_heads=5)
    assert estimate(ON_CPU, [LAYER, large, LAYER], 1000).buffers == 3 * 5 * 1024 * 24
    assert estimate(ON_DISK, [LAYER, large, LAYER], 1000).buffers == 3 * 5 * 1024 * 24 + (2 << 20)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, 5 * SEGMENT),  # 25,000 records of 2 * 4 * 24 = 192 bytes are 4.6 MiB
        ("int8", 4 << 20),  # of 2 * 4 * (12 + 4) = 128 bytes: 3.1 MiB
        ("fp8", 4 << 20),
    ],
)
def test_the_slow_tier_holds_every_full_block_in_whole_segments(dtype: str | None, expected: int) -> None:
    found = estimate(replace(ON_DISK, offload_dtype=dtype), [LAYER, DENSE], 100_003)
    assert (found.host, found.disk) == (0, 2 * expected)


def test_a_record_may_be_larger_than_a_segment() -> None:
    large = LayerShape(kv_heads=64, key_dim=4096, value_dim=4096, item_bytes=4)  # 8 MiB
    assert estimate(ON_CPU, [large], 84).host == 21 * 64 * 4 * 8192 * 4


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("key_dim", "value_dim", "dtype"), [(3, 2, torch.bfloat16), (8, 8, torch.float32)])
def test_a_unit_is_as_long_as_its_codec_makes_it(
    name: str | None, key_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    shape = LayerShape(kv_heads=1, key_dim=key_dim, value_dim=value_dim, item_bytes=dtype.itemsize)
    for block in (1, 4, 16):
        config = CacheConfig(block_size=block, offload="cpu", offload_dtype=name)
        assert shape.unit_bytes(config) == CODECS[name](block, key_dim, value_dim, dtype).unit_bytes


@pytest.mark.parametrize(("kind", "tokens"), [(LAYER, 67), (LAYER, 1003), (DENSE, 1003), (LAYER, 60_000)])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_real_store_takes_as_much(kind: LayerShape, tokens: int, dtype: str | None) -> None:
    config = replace(ON_CPU, offload_dtype=dtype)
    tier = HostTier()
    held = dense_slots if kind.is_dense else slots
    store = TieredStore(4, partial(held, config), Backing(tier, dtype), LayerCounts())
    store.append(*(torch.zeros(3, 2, tokens, dim, dtype=torch.float16) for dim in (8, 4)))
    found = estimate(config, [kind], tokens, batch=3)
    assert found.host == tier.used()["host"]
    real, wanted = store.fast_bytes(), found.pool + found.tables
    if found.host:  # tables of records are made for whole segments
        assert wanted <= real <= wanted + (1 << 20) // 128 * 20
    else:  # nothing was written, so there are no tables yet
        assert real == found.pool


def test_what_fits_the_slots_takes_nothing_of_the_slow_tier() -> None:
    fits, exceeds = (estimate(ON_DISK, [LAYER, DENSE], tokens) for tokens in (68, 69))  # 17 blocks, and 18
    assert (fits.disk, exceeds.disk) == (SEGMENT, 2 * SEGMENT)  # the dense layer is there anyway
    assert [estimate(ON_DISK, [DENSE], tokens).disk for tokens in (64, 65)] == [0, SEGMENT]


def test_disk_begins_where_the_host_limit_ends() -> None:
    shapes = [LAYER] * 4
    limited = replace(ON_DISK, host_limit=3_000_000)
    assert estimate(ON_DISK, shapes, 100_000).disk == 20 * SEGMENT
    found = estimate(limited, shapes, 100_000)
    assert (found.host, found.disk) == (3_000_000, 20 * SEGMENT - 3_000_000)
    found = estimate(replace(limited, host_limit=1 << 40), shapes, 100_000)
    assert (found.host, found.disk) == (20 * SEGMENT, 0)


@given(
    tokens=st.integers(1, 30_000),
    more=st.integers(0, 3_000),
    budget=st.one_of(st.integers(24, 4_000), st.floats(0.01, 1.0)),
    offload=st.sampled_from([None, "cpu", "disk"]),
    apart=st.booleans(),
)
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_a_longer_context_and_a_larger_budget_never_take_less(
    tokens: int, more: int, budget: int | float, offload: str | None, apart: bool
) -> None:
    config = replace(IN_MEMORY, budget=budget, offload=offload, per_query_head=apart)
    larger = replace(config, budget=budget + more if isinstance(budget, int) else min(1.0, budget + more / 30_000))
    found = estimate(config, [LAYER], tokens)
    longer = estimate(config, [LAYER], tokens + more).as_dict()
    assert all(longer[name] >= size for name, size in found.as_dict().items())
    # a dense layer gives its slots back when the context outgrows the budget, so it grows with the budget alone
    found, wider = (estimate(each, [LAYER, DENSE], tokens) for each in (config, larger))
    assert wider.fast >= found.fast and wider.host <= found.host and wider.disk <= found.disk
    held = slots(config, tokens, LAYER.group)
    assert min(num_blocks(tokens + 1, 4), config.budget_blocks(tokens + 1)) <= held <= num_blocks(tokens + 1, 4)


WANTED = Estimate(full=9 * GIB, pool=2 * GIB, memory=GIB // 2, tables=0, buffers=0, host=3 * GIB, disk=4 * GIB)
SMALLER = "lower the context, set offload_dtype='int8'"
REFUSALS = [
    (
        {"offload": None, "fast_limit": 2 * GIB},
        (None, None),
        "got a cache of 2.50 GiB of fast memory, expected at most 2.00 GiB (fast_limit): "
        "lower the context, set offload='cpu' or raise fast_limit",
    ),
    (
        {"offload": "cpu", "fast_limit": 2_560 * (1 << 20) - 1},
        (None, None),
        "got a cache of 2.50 GiB of fast memory, expected at most 2.50 GiB (fast_limit): "
        "lower the budget, lower the context or raise fast_limit",
    ),
    (
        {"offload": "cpu", "host_limit": 700 * (1 << 20)},
        (None, None),
        "got a cache of 3.00 GiB of host memory, expected at most 700.00 MiB (host_limit): "
        f"{SMALLER}, set offload='disk' or raise host_limit",
    ),
    (
        {"offload": "cpu"},
        (GIB, None),
        f"got a cache of 3.00 GiB of host memory, expected at most 1.00 GiB (free): {SMALLER} or set offload='disk'",
    ),
    (
        {"offload": "disk", "host_limit": 3 * GIB},
        (3 * GIB - 1, None),
        "got a cache of 3.00 GiB of host memory, expected at most 3.00 GiB (free): "
        "lower the context, set offload_dtype='int8' or lower host_limit",
    ),
    (
        {"offload": "disk", "disk_limit": 0},
        (None, None),
        f"got a cache of 4.00 GiB of disk, expected at most 0 bytes (disk_limit): {SMALLER} or raise disk_limit",
    ),
    (
        {"offload": "disk", "offload_dtype": "int8"},
        (None, 1 << 20),
        "got a cache of 4.00 GiB of disk, expected at most 1.00 MiB (free): lower the context or set another offload_dir",
    ),
]


@pytest.mark.parametrize(("changes", "free", "message"), REFUSALS)
def test_too_much_is_refused_in_one_line(
    changes: dict[str, object], free: tuple[int | None, int | None], message: str
) -> None:
    with pytest.raises(TierFullError) as caught:
        admit(replace(IN_MEMORY, **changes), WANTED, *free)
    assert str(caught.value) == message


def test_what_just_fits_is_admitted() -> None:
    every = {"fast_limit": 5 * GIB // 2, "host_limit": 3 * GIB, "disk_limit": 4 * GIB}
    admit(replace(ON_DISK, **every), WANTED, 3 * GIB, 4 * GIB)
    admit(ON_CPU, WANTED, None, None)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1536 << 10, "1.50 MiB"),
        (GIB - 1, "1024.00 MiB"),
        (GIB, "1.00 GiB"),
        (3 << 50, "3072.00 TiB"),
    ],
)
def test_bytes_are_readable(size: int, text: str) -> None:
    assert readable(size) == text


def test_free_memory_is_what_linux_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "MemTotal:  2000 kB\nMemFree:  1 kB\nMemAvailable:    1000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **_: said if str(path) == "/proc/meminfo" else "")
    assert free_host_bytes() == 1000 * 1024
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "MemTotal:  2000 kB\n")
    assert free_host_bytes() is None


def test_free_memory_is_unknown_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, **_: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert free_host_bytes() is None


def test_a_folder_that_is_yet_to_be_made_has_its_parents_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Usage:
        free = 77

    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or Usage)
    assert free_disk_bytes(tmp_path / "a" / "b") == free_disk_bytes(tmp_path) == 77
    assert asked == [tmp_path, tmp_path]
