"""`attnpred bench` runs the repository's benchmarks, and its last line is the JSON that others rely on."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpred import kernels
from attnpred.cli import main as cli
from benchmarks import attention, baselines, decode, limits
from benchmarks.models import random_model


def bench(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> dict[str, Any]:
    """Return the JSON object of one run."""
    assert cli.main(["bench", name, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "speed"]) == cli.USER_ERROR
    assert (
        "got benchmark 'speed', expected one of attention, selection, decode, batches, offload, memory"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_attention_prints_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--contexts", "512", "--rounds", "2", "--budgets", "128", "0.25", "--cold-mebibytes", "16"]
    found = bench(capsys, "attention", *small, "--shapes", "demo", "--dtypes", "bfloat16", "float32")
    rows = found["rows"]
    for row in rows:
        assert {"shape", "dtype", "context", "variant", "us", "bytes", "limit_us", "quartiles", "flop"} <= set(row)
        assert row["us"] > 0 < row["limit_us"]
        assert row["error"] <= found["tolerance"][row["dtype"]]
    variants = {(row["variant"], row.get("budget")): row for row in rows if row["dtype"] == "float32"}
    assert {
        ("transformers", None),
        ("packed", None),
        ("dense", None),
        ("sparse-torch", 128),
        ("sparse-torch", 0.25),
    } <= set(variants)
    assert variants["dense", None]["bytes"] == 2 * 2 * 512 * 64 * 4
    assert variants["sparse-torch", 128]["bytes"] == 2 * 2 * 128 * 64 * 4
    assert found["limits"][0]["stream_gb_per_s"] > 0
    assert {"commit", "torch", "threads", "cpu"} <= set(found)


def test_attention_takes_no_times_of_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: Any, keys: Any, values: Any, *, scale: float) -> Any:
        return kernels.DENSE_BACKENDS["torch"](query, keys, values, scale=scale * 1.1)

    monkeypatch.setattr(kernels, "dense_decode", wrong)
    with pytest.raises(SystemExit, match="got outputs of dense that are"):
        attention.main(
            ["--contexts", "256", "--shapes", "demo", "--dtypes", "float32", "--cold-mebibytes", "16", "--json"]
        )


@pytest.mark.slow
def test_decode_prints_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shapes", "demo", "tiny", "--dtypes", "float32", "--contexts", "256", "512", "--rounds", "2"]
    found = bench(capsys, "decode", *small, "--steps", "2", "--budget", "192", "--policies", "streaming")
    assert found["check_logits"] < 1e-4
    rows = {(row["shape"], row["context"], row["variant"]): row for row in found["rows"]}
    wanted = {"floor", "transformers", "packed", "dense", "predicted", "streaming"}
    assert {("demo", 512, name) for name in wanted} <= set(rows)
    assert {("tiny", context, name) for context in (256, 512) for name in wanted} <= set(rows)
    assert {name for _, context, name in rows if context == 256} == wanted | {"fits"}
    for row in rows.values():
        assert {"dtype", "ms_per_token", "spread", "budget", "layers"} <= set(row)
        assert row["ms_per_token"] > 0
    assert rows["tiny", 512, "predicted"]["tokens_attended"] <= 192
    assert rows["tiny", 512, "dense"]["tokens_attended"] > 512
    last = found["ratios"][-1]
    names = {"predicted_over_floor", "best_dense_over_predicted", "transformers_over_predicted"}
    assert (last["shape"], last["context"]) == ("tiny", 512) and names <= set(last)
    growth = {row["variant"]: row for row in found["growth"] if row["shape"] == "tiny"}
    assert growth["predicted"]["contexts"] == [256, 512]
    assert growth["predicted"]["paired"] and growth["predicted"]["growth"] == last["growth"]


def test_decode_takes_no_times_of_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.packed_attention

    def wrong(*given: Any, scaling: float, **named: Any) -> Any:
        return right(*given, scaling=scaling * 1.1, **named)

    monkeypatch.setattr(baselines, "packed_attention", wrong)
    with pytest.raises(SystemExit, match="got other logits from packed"):
        decode.main(["--shapes", "tiny", "--json"])


def test_the_model_is_given_back_as_it_was() -> None:
    model = random_model(shape="tiny")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), baselines.switchable(model):
        model.set_attn_implementation(baselines.FLOOR)
        raise RuntimeError
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError):
        model.set_attn_implementation(baselines.FLOOR)


@pytest.mark.slow
def test_batches_prints_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shape", "tiny", "--context", "512", "--layers", "2", "--budget", "192", "--rounds", "2"]
    found = bench(capsys, "batches", "--batches", "1", "3", *small)
    rows = {(row["batch"], row["kind"], row["variant"]): row for row in found["rows"]}
    variants = ("floor", "transformers", "packed", "dense", "predicted")
    assert set(rows) == {
        (batch, kind, name) for batch in (1, 3) for kind in ("separate", "shared") for name in variants
    }
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 1e3 / row["ms_per_step"], rel=0.01)
    assert rows[3, "separate", "packed"]["tokens_held"] == 512 + 384 + 256


@pytest.mark.slow
def test_selection_prints_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "selection", "--contexts", "2048", "--rounds", "2", "--variants", "ema")
    for row in found["rows"]:
        assert {"context", "kv_heads", "variant", "us", "attention_us"} <= set(row)
    assert {"predicted", "ema"} <= {row["variant"] for row in found["rows"]}


@pytest.mark.slow
def test_limits_hold_for_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("numba", "torch") if find_spec("numba") else ("torch",):
        if method == "torch":
            monkeypatch.setattr(limits, "find_spec", lambda name: None)
        memory = limits.ColdMemory(16 << 20)
        found = limits.measure(memory, (2048, 4096), rounds=2)
        assert found["method"] == method and found["stream_gb_per_s"] > 0
        assert set(found["block_gb_per_s"]) == {"2048", "4096"}


def test_sums_read_every_word_once() -> None:
    pytest.importorskip("numba")
    from benchmarks import numba_sums

    words = torch.arange(64 * 512)
    assert numba_sums.read(words, None, 4096) == int(words.sum())
    places = torch.randperm(64)[:7]
    assert numba_sums.read(words, places, 4096) == int(words.view(64, 512)[places].sum())


@pytest.mark.slow
def test_offload_prints_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--context", "2048", "--layers", "1", "--rounds", "1", "--steps", "3", "--demo-steps", "3"]
    assert cli.main(["bench", "offload", "--json", "--folder", str(tmp_path), *small]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["variant"]: row for row in found["rows"] if row["shape"] == "1b"}
    assert {"memory", "disk", "disk-full"} <= set(rows)
    for row in rows.values():
        assert {"context", "ms_per_token", "bytes_per_token", "hit_rate", "exposed_wait_ms"} <= set(row)
    assert (
        rows["memory"]["bytes_per_token"] == 0 < rows["disk"]["bytes_per_token"] < rows["disk-full"]["bytes_per_token"]
    )
    assert rows["disk-full"]["bytes_per_token"] == 128 * 16 * 2 * 8 * 64 * 2  # every block of the context, once
    assert list(tmp_path.iterdir()) == []  # no file is left
