"""`attnpred report`: a page and figures from rows; a mistake is one line, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attnpred.cli.main import main
from attnpred.report.attention import HeadAttention, save_attention

DATA = Path(__file__).parents[1] / "report" / "data" / "rows.jsonl"
RECOVERY = Path(__file__).parents[2] / "docs" / "results" / "recovery.jsonl"
DECODE = RECOVERY.with_name("decode.json")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def command(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["report", *map(str, arguments), "--out", str(tmp_path / "report.html")])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_a_page_and_figures(run: Run, tmp_path: Path) -> None:
    attention, figures = tmp_path / "a.safetensors", tmp_path / "figures"
    save_attention(HeadAttention("x", torch.rand(4, 5), torch.rand(4, 5), torch.rand(4, 5) > 0.5), attention)
    code, out, err = run(DATA, "--figures", figures, "--bench", DECODE, "--attention", attention, "--json")
    said = json.loads(out.splitlines()[-1])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert code == 0 and err == "" and said["rows"] == len(DATA.read_text(encoding="utf-8").splitlines())
    written = sorted(figures.iterdir())
    assert len(written) == said["charts"] == page.count("<svg ") and all(path.suffix == ".svg" for path in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "figures", "report.html"]


def test_rows_of_before_the_grid_are_read(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(RECOVERY)
    assert code == 0 and f"{len(RECOVERY.read_text(encoding='utf-8').splitlines())} rows" in out
    assert "No row has a paired comparison with the full cache" in (tmp_path / "report.html").read_text(
        encoding="utf-8"
    )


def test_a_line_without_policy_is_one_line(run: Run, tmp_path: Path) -> None:
    lines = DATA.read_text(encoding="utf-8").splitlines()
    lines[6] = json.dumps({key: value for key, value in json.loads(lines[6]).items() if key != "policy"})
    wrong = tmp_path / "rows.jsonl"
    wrong.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "report.html").write_text("what was there", encoding="utf-8")
    code, out, err = run(wrong)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"got {wrong} line 7 without 'policy', expected the keys model, policy, task, metric, value" in err
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "what was there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/no/rows.jsonl",), "got /no/rows.jsonl (No such file or directory), expected a file of rows"),
        ((DATA, "--bench", DATA), "that is not JSON|without 'rows'"),
        ((DATA, "--attention", DATA), "expected a safetensors file that `attnpred demo --attention` wrote"),
        ((DATA, "--figures", DATA), "expected a folder"),
        ((DATA, "--out", "/no/such/a.html"), "expected the name of a file in a folder that exists"),
        ((), "ROWS"),
    ],
)
def test_other_mistakes(arguments: tuple[str | Path, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    own = [] if "--out" in arguments else ["--out", str(tmp_path / "a.html")]
    assert main(["report", *map(str, arguments), *own]) == 2
    err = capsys.readouterr().err
    assert any(part in err for part in message.split("|")) and err.count("\n") == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_rows_are_not_written_over(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_bytes(DATA.read_bytes())
    code, _, err = run(tmp_path / "report.html")
    assert code == 2 and "which is also read" in err and (tmp_path / "report.html").read_bytes() == DATA.read_bytes()
