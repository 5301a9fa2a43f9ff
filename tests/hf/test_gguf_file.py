"""A GGUF file loads like a folder, is converted once, and is refused in one line where it cannot be read."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import gguf

from attnpred.errors import MissingExtraError, StoreError, UnsupportedModelError
from attnpred.hf import gguf_file, load_model
from attnpred.hf.gguf_file import config_of, converted
from attnpred.hf.load import load_config
from attnpred.hf.once import once
from tests.gguf_files import logits, write_gguf
from tests.models import prompt

Kind = gguf.GGMLQuantizationType
Q4_1, Q8_0, F16, BF16 = Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnpred" / "models"


def test_a_file_of_plain_numbers_gives_the_very_logits(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf")
    loaded, tokenizer = load_model(str(tmp_path / "tiny.gguf"), dtype=torch.float32)
    assert torch.equal(logits(loaded, prompt(1, 30)), logits(model, prompt(1, 30)))
    assert tokenizer("abA")["input_ids"] == [95, 3 + ord("A") - 33]
    assert load_config(str(tmp_path / "tiny.gguf"))[0].hidden_size == model.config.hidden_size


@pytest.mark.parametrize("kind", [Q4_1, Q8_0])
def test_blocks_are_unpacked_and_rounded_to_bf16(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", kind)
    loaded, _ = load_model(str(tmp_path / "tiny.gguf"), dtype=torch.float32)
    for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj"):
        given = model.get_submodule(f"model.layers.1.{name}").weight.detach().numpy()
        expected = gguf.dequantize(gguf.quantize(given, kind), kind)
        rounded = torch.from_numpy(expected).bfloat16().float()
        assert torch.equal(loaded.get_submodule(f"model.layers.1.{name}").weight, rounded), name


@pytest.mark.parametrize(
    ("kind", "dtype"), [(None, "float32"), (Q4_1, "bfloat16"), (F16, "float16"), (BF16, "bfloat16")]
)
def test_the_config_can_be_had_without_converting(kind: Any, dtype: str, tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", kind)
    found, chosen = load_config(str(tmp_path / "tiny.gguf"), dtype="float16")
    assert chosen.dtype == torch.float16
    assert found.hidden_size == 32 and found.dtype == getattr(torch, dtype)
    assert not own_cache.exists()
    converted(tmp_path / "tiny.gguf")
    assert config_of(tmp_path / "tiny.gguf").dtype == found.dtype


def test_it_is_converted_once_and_again_when_its_content_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    first = converted(path)
    path.rename(tmp_path / "moved.gguf")
    assert converted(tmp_path / "moved.gguf") == first
    assert capsys.readouterr().err.count("converting") == 1
    write_gguf(path, Q8_0)
    assert converted(path) != first
    assert not list(first.parent.glob(".*.work"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "none", "folder", "other"])
def test_what_is_no_gguf_file_is_one_line(damage: str, tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "none":
        made = {
            "cut": content[: len(content) // 3],
            "flipped": content[:8] + b"\xff" * 8 + content[16:],
            "empty": b"",
            "other": b"{}",
        }
        path.write_bytes(made[damage])
    with pytest.raises(UnsupportedModelError, match=r"expected a (whole )?GGUF file") as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    assert damage != "cut" or "copy it again if it was cut off" in str(caught.value)
    assert not list(own_cache.glob("*/[!.]*"))


@pytest.mark.parametrize("use", [load_model, load_config])
def test_absurd_sizes_are_refused_before_anything_is_made_of_them(use: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", layers=4_000_000_000)
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers"):
        use(str(tmp_path / "tiny.gguf"))


def test_without_the_extra_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'attnpred\[gguf\]'"):
        load_model(str(tmp_path / "tiny.gguf"))


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    calls = iter(((1, 1), (1, 2)))
    monkeypatch.setattr(gguf_file, "_state", lambda _: next(calls))
    with pytest.raises(UnsupportedModelError, match="changed while it was converted"):
        converted(path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="expected a folder that can be written"):
        once(tmp_path / "file" / "model", lambda work: work)


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(work: Path) -> Path:
        (work / "half").write_text("half")
        raise UnsupportedModelError("no")

    with pytest.raises(UnsupportedModelError):
        once(tmp_path / "here" / "model", fail)
    assert [path.name for path in (tmp_path / "here").iterdir()] == [".model.lock"]
