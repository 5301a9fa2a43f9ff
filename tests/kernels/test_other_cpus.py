"""The numba kernels, compiled in a process of their own for CPUs with shorter vectors: the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

CHECK = """
import torch
from attnpred.kernels import linear, numba_decode, numba_digest, numba_linear, digest
from attnpred.kernels.reference import sparse_decode as reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    keys, values = (torch.randn(1, 2, 64, 48).to(dtype) for _ in range(2))
    values[0, 0, 0, :3] = torch.tensor([1e-6, -6e-8, 6e4]).to(dtype)
    query, selection = torch.randn(1, 6, 48).to(dtype), torch.tensor([[[0, 5, 1], [2, 7, 0]]])
    call = dict(block_size=8, scale=0.3)
    got = numba_decode.sparse_decode(query, keys, values, selection, 60, **call)
    want = reference(query, keys, values, selection, 60, **call)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-2)
codes, query = digest.pack(torch.randn(2, 200, 32)), torch.randn(2, 4, 32) * 0.2
got, want = numba_digest.digest_shares(query, codes, 2), digest.digest_shares_reference(query, codes, 2)
assert (got - want).abs().mean() < 0.05, (got - want).abs().mean()
for bits in (8, 4):
    weight, x = linear.pack(torch.randn(37, 80), bits), torch.randn(5, 80)
    got, want = numba_linear.Matrices([weight], [None], x.dtype).product(x), linear.product(x, weight)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the names are of x86 CPUs")
@pytest.mark.parametrize("cpu", ["x86-64"])
def test_same_results_on_older_cpus(cpu: str, tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert found.stdout.strip() == "same", found.stderr
