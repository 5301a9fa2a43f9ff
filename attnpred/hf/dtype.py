"""In which numbers a model is loaded: `auto` asks what the machine is fast at, and what fits.

An accelerator takes the numbers of the file. A CPU multiplies bfloat16 well only where it has a unit for that; without
one a prompt takes several times as long as in float32 (`docs/LOG.md`), while a decode step takes about the same.
So 16-bit weights become float32 there if that fits in free memory; if it does not they stay as they are, and the log
says so. Weights that are stored in float32, or are quantised, are never changed.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from attnpred.errors import ConfigError

logger = logging.getLogger("attnpred")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "ARM BF16"}
"""Flags of processors that multiply bfloat16 in hardware, as Linux and torch call them."""
ROOM = 0.8
"""Of free memory, what weights may take: the rest is for the cache and the step."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A dtype, and in a few words why."""

    dtype: torch.dtype
    why: str


def bf16_unit() -> str | None:
    """Return the name of this CPU's unit for products of bfloat16, or None."""
    seen = {name for name, has in getattr(torch.cpu, "get_capabilities", dict)().items() if has is True}
    for line in _lines("/proc/cpuinfo"):
        title, _, flags = line.partition(":")
        if title.strip() in ("flags", "Features"):
            seen.update(flags.split())
            break
    return next((unit for flag, unit in UNITS.items() if flag in seen), None)


def free_memory() -> int | None:
    """Return the bytes of host memory that this process may still take, a container's limit included; None if unknown."""
    found = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdecimal():
        found.append(max(0, int(limit[0]) - int(used[0])))
    return min(found, default=None)


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that a model's config names; one that names none is float32."""
    found: Any = config.dtype or getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    return found


def choose_dtype(config: PreTrainedConfig, device: str, asked: str | torch.dtype = "auto") -> Chosen:
    """Return the dtype in which the model of `config` is loaded on `device`. Raises `ConfigError` for an unknown name."""
    if isinstance(asked, torch.dtype):
        return Chosen(asked, "asked for")
    if asked in DTYPES:
        return Chosen(DTYPES[asked], "asked for")
    if asked != "auto":
        raise ConfigError(f"got dtype={asked!r}, expected auto, {', '.join(DTYPES)}")
    stored = stored_dtype(config)
    name = str(stored).removeprefix("torch.")
    if torch.device(device).type != "cpu":
        return Chosen(stored, f"as stored, for {device}")
    if stored not in (torch.bfloat16, torch.float16) or getattr(config, "quantization_config", None) is not None:
        return Chosen(stored, "as stored")
    unit = bf16_unit()
    if unit is not None and stored == torch.bfloat16:
        return Chosen(stored, f"as stored: this CPU multiplies bfloat16 ({unit})")
    size, free = 4 * _parameters(config), free_memory()
    if free is None or size <= ROOM * free:
        return Chosen(torch.float32, f"stored in {name}, in which this CPU is slow")
    why = f"float32 would take {size / 2**30:.1f} GiB of {free / 2**30:.1f} GiB of free memory"
    logger.warning("%s, so the model stays in %s, in which this CPU is slow", why, name)
    return Chosen(stored, f"as stored: {why}")


def auto_dtype() -> str:
    """Return what `auto` does on this machine, in words."""
    if torch.cuda.is_available():
        return "as stored, on the GPU"
    unit = bf16_unit()
    if unit is not None:
        return f"bfloat16 as stored, float16 as float32: this CPU multiplies bfloat16 ({unit})"
    return f"float32 if it fits in memory: this CPU has none of {', '.join(UNITS.values())}"


def _parameters(config: PreTrainedConfig) -> int:
    """Return how many numbers a model has, without making them."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config)
        )  # it writes its dtype into what it is given
    return sum(parameter.numel() for parameter in model.parameters())


def _lines(path: str) -> list[str]:
    """Return the lines of a file of the system; none where there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
