"""Every policy of the table runs by its name, with its own defaults, through the commands that take one."""

import json
from pathlib import Path

import pytest

from attnpred.cli.main import main
from attnpred.policies import POLICIES

NAMES = tuple(POLICIES)
SPARSE = ["--budget", "128", "--num-sink-tokens", "16", "--recent-window", "32", "--dense-layers", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The old mill stood by the river, and nobody knew why. " * 30, encoding="utf-8")
    given = ["generate", "demo", "--prompt-file", str(prompt), "--policy", name, "--max-new-tokens", "4", "--json"]
    assert main([*given, *SPARSE]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    counted = found["stats"]["total"]
    assert counted["fallbacks"] == 0
    assert POLICIES[name].is_dense or counted["sparse_steps"] > 0


@pytest.mark.slow
def test_eval(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    given = ["eval", "demo", "--tasks", "facts1", "--lengths", "400", "--documents", "1", "--budgets", "0.5"]
    assert main([*given, "--policies", ",".join(NAMES), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["policy"] for row in rows] == ["full", *(name for name in NAMES if name != "full")]
    assert all(row["granularity"] and row["kind"] for row in rows)


@pytest.mark.slow
def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    others = ",".join(name for name in NAMES if name not in ("full", "predicted"))
    small = ["--shapes", "demo", "--dtypes", "float32", "--contexts", "400", "--rounds", "1", "--steps", "1"]
    given = ["bench", "decode", "--json", *small, "--budget", "192", "--variants", "dense", "predicted"]
    assert main([*given, "--policies", others]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["variant"] for row in found["rows"]} == {"dense", *NAMES} - {"full"}
