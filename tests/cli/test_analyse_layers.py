"""`attnpred analyse-layers`: its similarities are those of the model's eager attention, and its file can be attached."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import attnpred
from attnpred import hf
from attnpred.cli.main import main
from attnpred.evaluation.layer_analysis import analyse_layers
from attnpred.predictor.layer_groups import LayerGroups, jensen_shannon
from tests.hf.support import greedy, text_of, tokenizer
from tests.models import prompt, tiny_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of 150 tokens."""
    path = tmp_path / "text.txt"
    path.write_text(text_of(prompt(1, 150)[0]))
    return path


@pytest.fixture
def run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command with a tiny model of the name `llama`."""

    def load(name: str, **how: object) -> tuple[PreTrainedModel, object]:
        return tiny_model(name), tokenizer()

    monkeypatch.setattr(hf, "load_model", load)

    def call(*options: str, text: str = str(text)) -> tuple[int, str, str]:
        code = main(
            ["analyse-layers", "llama", "--text", text, "--out", str(tmp_path / "g.json"), "--tokens", "60", *options]
        )
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.mark.parametrize(("family", "layers"), [("llama", (0, 1, 2)), ("gemma2", (0, 2)), ("gpt_oss", (0, 2))])
@torch.no_grad()
def test_similarities_are_those_of_the_model_s_own_weights(family: str, layers: tuple[int, ...], text: Path) -> None:
    model = tiny_model(family)
    found = analyse_layers(model, tokenizer(), [text], base_model="m", tokens=60, rows=7, delta=0.5)
    assert found.layers == layers and found.rows == 14 and (found.query_heads, found.kv_heads) == (4, 2)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        ids = tokenizer()(text.read_text(), return_tensors="pt")["input_ids"]
        weights = [model(ids[:, a : a + 60], output_attentions=True).attentions for a in (0, 60)]
    finally:
        model.set_attn_implementation(before)
    for kv in range(2):
        for i, low in enumerate(layers):
            for j, high in enumerate(layers):
                pairs = [(sample[low][0], sample[high][0]) for sample in weights]
                heads = slice(2 * kv, 2 * kv + 2)
                each = [1 - jensen_shannon(p[heads, -7:], q[heads, -7:]).mean() for p, q in pairs]
                assert found.similarity[kv][i][j] == pytest.approx(float(sum(each)) / 2, abs=1e-4)


def test_the_command_writes_a_file_and_a_picture_that_attach_takes(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--delta", "0", "--rows", "5", "--figure", str(tmp_path / "a.svg"), "--json")
    said = json.loads(out.splitlines()[-1])
    assert code == 0 and said["groups"] == [[[0, 1, 2]], [[0, 1, 2]]] and said["dropped"] == pytest.approx(2 / 3)
    assert said["rows"] == 10 and "<svg" in (tmp_path / "a.svg").read_text()
    model, tokens = tiny_model("llama"), prompt(1, 50)
    with attnpred.attach(model, policy="pod", layer_groups=tmp_path / "g.json", own_sinks=2, own_recent=4) as attached:
        greedy(model, tokens, 4)
        assert "distant keys are shared" in attached.stats()["total"]["dense"]


def test_the_words_name_the_groups(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--delta", "1", "--rows", "5")
    assert code == 0 and "0% of the distant keys" in out and "kv head 1: 0 | 1 | 2" in out
    assert not LayerGroups.load(tmp_path / "g.json").shares


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "200"), "got no text of at least 200 tokens"),
        (("--rows", "61"), "got rows=61, expected 1 to tokens=60"),
        (("--delta", "2", "--rows", "5"), "got delta=2.0, expected a similarity"),
        (("--figure", "a.jpg"), "expected a name that ends in .png or .svg"),
    ],
)
def test_a_mistake_is_one_line(run: Run, options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, _, err = run(*options)
    assert code == 2 and message in err and len(err.strip().splitlines()[-1:]) == 1
    assert not (tmp_path / "g.json").exists()


def test_a_missing_text_is_one_line(run: Run) -> None:
    code, _, err = run(text="none.txt")
    assert code == 2 and "got none.txt, expected a text file" in err


def test_the_demo_model_generates_with_keys_that_are_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, groups = tmp_path / "text.txt", str(tmp_path / "g.json")
    text.write_text("The old clock stood by the mill, and nobody knew why it had stopped. " * 40)
    short = ["--tokens", "256", "--rows", "8", "--per-file", "1"]
    assert main(["analyse-layers", "demo", "--text", str(text), "--out", groups, "--delta", "0.1", *short]) == 0
    assert LayerGroups.load(Path(groups)).shares
    windows = ["--layer-groups", groups, "--own-sinks", "4", "--own-recent", "32", "--distant-gate", "0.9"]
    capsys.readouterr()
    options = ["--prompt-file", str(text), "--policy", "pod", "--max-new-tokens", "4", *windows]
    assert main(["generate", "demo", *options, "--stats"]) == 0
    assert "keys that layers share: " in capsys.readouterr().err
    assert main(["generate", "demo", *options, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])["stats"]
    assert stats["saved_bytes"] > 0 and stats["total"]["dense"].get("distant keys are shared", 0) >= 6
    assert 0 <= stats["total"]["distant_skipped"] < 1
