"""The dtype of a load: what was asked for, else what the machine is fast at and has room for, or a line."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnpred.cli.main import main
from attnpred.errors import ConfigError
from attnpred.hf import dtype as rule
from attnpred.hf.dtype import DTYPES, Chosen, choose_dtype
from attnpred.hf.load import load_config, load_model
from tests.models import BASE

GIB = 1 << 30


def config(stored: str | None = "bfloat16", **more: Any) -> LlamaConfig:
    return LlamaConfig(**BASE, **({} if stored is None else {"dtype": stored}), **more)


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without a unit for 16 bits, with memory."""
    monkeypatch.setattr(rule, "bf16_unit", lambda: None)
    monkeypatch.setattr(rule, "free_memory", lambda: GIB)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_sixteen_bits_become_float32_where_they_are_slow(stored: str) -> None:
    given = config(stored)
    found = choose_dtype(given, "cpu")
    assert found == Chosen(torch.float32, f"stored in {stored}, in which this CPU is slow")


def test_a_unit_for_bfloat16_is_used_for_bfloat16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "bf16_unit", lambda: "AMX")
    assert choose_dtype(config(), "cpu") == Chosen(torch.bfloat16, "as stored: this CPU multiplies bfloat16 (AMX)")
    assert choose_dtype(config("float16"), "cpu").dtype == torch.float32
    assert choose_dtype(config("float32"), "cpu").dtype == torch.float32


def test_what_does_not_fit_stays_as_it_is_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = 4 * sum(parameter.numel() for parameter in LlamaForCausalLM(config()).parameters())
    monkeypatch.setattr(rule, "free_memory", lambda: int(size / rule.ROOM) + 1)
    assert choose_dtype(config(), "cpu").dtype == torch.float32 and not caplog.records
    monkeypatch.setattr(rule, "free_memory", lambda: int(size / rule.ROOM) - 2)
    with caplog.at_level(logging.WARNING, "attnpred"):
        found = choose_dtype(config(), "cpu")
    assert found.dtype == torch.bfloat16 and "of free memory" in found.why
    [said] = [record.getMessage() for record in caplog.records]
    assert "so the model stays in bfloat16, in which this CPU is slow" in said and "\n" not in said


def test_where_memory_cannot_be_told_it_is_taken_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "free_memory", lambda: None)
    assert choose_dtype(config(), "cpu").dtype == torch.float32


@pytest.mark.parametrize(
    ("stored", "more", "device"),
    [
        ("bfloat16", {}, "cuda:1"),
        ("float16", {}, "mps"),
        ("float32", {}, "cpu"),
        (None, {}, "cpu"),
        ("bfloat16", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cpu"),
    ],
)
def test_all_else_stays_as_it_is_stored(stored: str | None, more: dict[str, Any], device: str) -> None:
    found = choose_dtype(config(stored, **more), device)
    assert found.dtype == DTYPES[stored or "float32"] and found.why.startswith("as stored")


@pytest.mark.parametrize("asked", DTYPES)
def test_what_is_asked_for_is_taken(asked: str) -> None:
    for given in (asked, DTYPES[asked]):
        assert choose_dtype(config(), "cpu", given) == Chosen(DTYPES[asked], "asked for")
        assert load_config("demo", dtype=given)[1].dtype == DTYPES[asked]


def test_another_name_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^got dtype='int8', expected auto, float32, bfloat16, float16$"):
        choose_dtype(config(), "cpu", "int8")


def test_a_model_is_loaded_as_the_rule_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        from_pretrained = staticmethod(lambda source: None)

    monkeypatch.setattr("attnpred.hf.load.AutoTokenizer", Tokenizer)
    LlamaForCausalLM(config()).to(torch.bfloat16).save_pretrained(tmp_path)
    for asked, wanted in (("auto", torch.float32), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)):
        model, _ = load_model(str(tmp_path), device="cpu", dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {wanted} == {model.config.dtype}
        assert load_config(str(tmp_path), device="cpu", dtype=asked)[1].dtype == wanted


def test_the_demo_is_in_float32_on_every_cpu_and_as_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "bf16_unit", lambda: "AMX")
    assert load_model("demo", device="cpu")[0].dtype == torch.float32
    assert load_model("demo", device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


CPUS = {
    "processor\t: 0\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16 avx512_bf16\n": "AMX",
    "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\nbugs\t\t: amx_bf16\n": "AVX512-BF16",
    "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n": "ARM BF16",
    "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n": None,
    "": None,
}


@pytest.mark.parametrize("text", CPUS)
def test_the_unit_is_read_from_the_flags_of_the_processor(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(rule, "_lines", lambda path: text.splitlines())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "cpu_name": "bf16"}, raising=False)
    assert rule.bf16_unit() == CPUS[text]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert rule.bf16_unit() == "AMX"


def test_free_memory_is_what_the_machine_and_its_container_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = {"/proc/meminfo": ["MemTotal: 9000 kB", "MemAvailable: 1000 kB"]}
    monkeypatch.setattr(rule, "_lines", lambda path: files.get(path, []))
    assert rule.free_memory() == 1000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": ["max"], "/sys/fs/cgroup/memory.current": ["7"]}
    assert rule.free_memory() == 1000 * 1024
    files["/sys/fs/cgroup/memory.max"] = ["5007"]
    assert rule.free_memory() == 5000
    files.clear()
    assert rule.free_memory() is None


def test_info_says_what_auto_is_and_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info"]) == 0
    assert "this CPU has none of AMX, AVX512-BF16, ARM BF16" in capsys.readouterr().out
    monkeypatch.setattr(rule, "bf16_unit", lambda: "AMX")
    assert main(["info"]) == 0
    assert "this CPU multiplies bfloat16 (AMX)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "chat", "capture", "eval", "analyse-layers", "demo", "info"])
def test_every_command_that_loads_a_model_takes_a_dtype(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text. " * 100, encoding="utf-8")
    rest = {
        "generate": ["demo", "--prompt-file", str(text)],
        "chat": ["demo", "--document", str(text)],
        "capture": ["demo", "--text", str(text), "--out", str(tmp_path / "traces")],
        "eval": ["demo", "--out", str(tmp_path / "rows.jsonl"), "--budgets", "0.5"],
        "analyse-layers": ["demo", "--text", str(text), "--out", str(tmp_path / "groups.json")],
        "demo": [],
        "info": ["--model", "demo"],
    }
    assert main([command, *rest[command], "--dtype", "int8"]) == 2
    assert "got dtype='int8', expected auto, float32, bfloat16, float16" in capsys.readouterr().err
