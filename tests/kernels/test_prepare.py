"""After `prepare` no decode step compiles anything: whoever waits for an answer does not wait for that."""

import subprocess
import sys

import pytest

pytest.importorskip("numba")

from attnpred.kernels import prepare

DECODE = """
import sys
from attnpred.kernels.prepare import prepare, takes_time

prepare("cpu")
assert not takes_time("cpu")
loaded = {name for name in sys.modules if name.startswith("attnpred.kernels.numba_")}
import attnpred
from attnpred.hf import load_model

model, tokenizer = load_model("demo")
inputs = tokenizer("It rained on the garden that day. " * 60, return_tensors="pt")
for policy in ("predicted", "ema", "full"):
    with attnpred.attach(model, budget=128, policy=policy, num_sink_tokens=16, recent_window=32) as attached:
        model.generate(**inputs, max_new_tokens=4)
new = {name for name in sys.modules if name.startswith("attnpred.kernels.numba_")} - loaded
sys.exit(", ".join(new) or 0)
"""


@pytest.mark.slow
def test_a_decode_step_compiles_nothing_more() -> None:
    done = subprocess.run([sys.executable, "-c", DECODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-400:]


def test_only_a_processor_needs_it_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "import_module", lambda name: pytest.fail("loaded for a GPU"))
    prepare.prepare("cuda")
    assert not prepare.takes_time("cuda")
    monkeypatch.setattr("attnpred.kernels.numba_cache.is_filled", lambda: False)
    monkeypatch.setattr(prepare, "MODULES", ("attnpred.kernels.numba_none",))
    assert prepare.takes_time("cpu")
    monkeypatch.setattr(prepare, "MODULES", ("attnpred.kernels.numba_cache",))
    assert not prepare.takes_time("cpu")
