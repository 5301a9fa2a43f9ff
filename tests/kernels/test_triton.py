"""The Triton kernels: they compute the right thing (`triton_cases.py`), and they compile for GPUs.

With a GPU the cases run here. Without one they run in Triton's interpreter, in a process of their own: it has to be
switched on before anything imports triton, and transformers does. What the interpreter takes the compiler may refuse, so
every kernel is also compiled for two generations of GPUs, which needs none; only running on one needs one.

Where there is no triton (it exists for Linux on x86-64), there is nothing to test.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform == "linux" and platform.machine() == "x86_64":
    import triton  # it has to be there
else:
    triton = pytest.importorskip("triton")

from attnpred.kernels import triton_decode, triton_select, triton_tools

if torch.cuda.is_available() or triton_tools.interpreted():
    from tests.kernels.triton_cases import *  # noqa: F403
else:

    @pytest.mark.slow
    def test_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/triton_cases.py"]
        root, variables = Path(__file__).parents[2], os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and re.search(r"^\d+ passed in ", done.stdout, re.M), done.stdout + done.stderr


SHARED = {80: 99 * 1024, 90: 227 * 1024}
"""Compute capability: bytes of shared memory that a program may have, for 80 those of the smaller chips (86, 89)."""

Kernels = dict[str, str]
"""Name: PTX."""


@pytest.fixture(params=SHARED)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernels:
    """Let a launch compile the kernel for a GPU, and be all it does; return what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    found: Kernels = {}

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        signature, constants, aligned = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.params, arguments, strict=True)):
            is_special = type(value) is int and not parameter.do_not_specialize  # then 1 and multiples of 16 are
            if parameter.is_constexpr or (is_special and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            if torch.is_tensor(value) or (is_special and value % 16 == 0):
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature, constants, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", request.param, 32), options=options)
        assert all(size > 0 for size in grid) and made.asm["cubin"]
        assert made.metadata.shared <= SHARED[request.param]
        found[self.__name__] = made.asm["ptx"]

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tools, "processors", lambda device: 132)
    return found


def decode(dtype: torch.dtype, kv_heads: int, dim: int, block: int, chosen: int, **named: Any) -> None:
    query, ids = torch.zeros(1, 32, dim, dtype=dtype), torch.zeros(1, kv_heads, chosen, dtype=torch.int64)
    keys = torch.zeros(1, kv_heads, block * 32, dim, dtype=dtype)
    triton_decode.sparse_decode(query, keys, keys, ids, 500, block_size=block, scale=0.1, **named)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "dim", "block", "chosen"),
    [
        (torch.bfloat16, 8, 64, 16, 158),
        (torch.float32, 32, 256, 16, 20),
        (torch.float16, 1, 72, 7, 20),
        (torch.bfloat16, 2, 512, 256, 20),
        (torch.float16, 8, 64, 1, 20),
    ],
)
def test_sparse_decode_compiles(
    compiled: Kernels, dtype: torch.dtype, kv_heads: int, dim: int, block: int, chosen: int
) -> None:
    decode(dtype, kv_heads, dim, block, chosen)
    assert set(compiled) == {"_attend", "_merge"}
    assert "cp.async" in compiled["_attend"] and ("mma" in compiled["_attend"]) == (dtype != torch.float32)


@pytest.mark.slow
def test_all_options_compile(compiled: Kernels) -> None:
    mask = torch.ones(1, 500, dtype=torch.bool)
    decode(torch.bfloat16, 8, 64, 16, 20, softcap=3.0, sinks=torch.zeros(32), mask=mask)


@pytest.mark.slow
def test_selection_compiles(compiled: Kernels) -> None:
    for vectors, rank in ((1, 64), (16, 16)):
        triton_select.digest_shares(torch.zeros(8, 4, rank), torch.zeros(8, 512 * vectors, rank // 2).char(), vectors)
    estimate, past, weights = torch.zeros(1, 8, 600), torch.zeros(1, 8, 1, 700), torch.zeros(1, 8, 4)
    triton_select.weigh(estimate, past, weights, torch.zeros(500), 1, 501, 504)
    selection, distance = torch.zeros(1, 8, 158, dtype=torch.int64), torch.zeros(600)
    triton_select.remember(past, 0.03, 601, estimate, weights, distance, selection, torch.zeros(1, 8, 158))
    assert set(compiled) == {"_products", "_shares", "_weigh", "_remember"}
    # old values of the selection are read, then all is changed, then what was attended is written
    found = re.findall(r"ld\.global|st\.global|bar\.sync", compiled["_remember"])
    order = [word for word, before in zip(found, ["", *found], strict=False) if word != before]
    assert order == ["ld.global", "bar.sync", "ld.global", "bar.sync", "st.global", "bar.sync", "st.global"]
