"""`benchmarks/gpu.py` is written for machines that the tests do not run on: a dry run of all of it, in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

if sys.platform != "linux":
    pytest.importorskip("triton")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_dry_run() -> None:
    sizes = "--contexts 256 --decoded 300 --rounds 1 --steps 2 --layers 2 --shape tiny".split()
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", *sizes]
    done = run(*command, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    failed = [row["variant"] for part in ("attention", "selection", "decode") for row in found[part] if "error" in row]
    assert failed == ["transformers-offloaded"], done.stderr  # transformers can do that on a GPU alone
    for part, key in (("attention", "limit_us"), ("selection", "wall_us"), ("decode", "ms_per_token")):
        assert any(row.get(key, 0) > 0 for row in found[part]), part
    difference = [row["most"] for row in found["attention"] if row["variant"] == "triton_minus_torch"]
    assert len(difference) == 2 and all(max(most) < 0.02 for most in difference)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["sh", "benchmarks/gpu.sh"], [sys.executable, "-m", "benchmarks.gpu"]])
def test_without_a_gpu_it_is_one_line_and_code_2(command: list[str]) -> None:
    done = run(*command, PYTHON=sys.executable)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("got no CUDA device")
