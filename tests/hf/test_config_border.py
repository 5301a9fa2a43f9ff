"""A model's config of wrong types or absurd sizes is one line, at once; those of every family pass."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnpred.cli.main import main
from attnpred.errors import UnsupportedModelError
from attnpred.hf.config_border import check_config
from attnpred.hf.load import load_config, load_model
from attnpred.hf.named_models import DEMO_MODEL
from tests.models import FAMILIES, tiny_model

CONFIG = json.loads((DEMO_MODEL / "config.json").read_text())


def folder_of(path: Path, config: str) -> Path:
    """Return a folder with the demo model's other files and this config."""
    for file in DEMO_MODEL.iterdir():
        (path / file.name).symlink_to(file)
    (path / "config.json").unlink()
    (path / "config.json").write_text(config)
    return path


WRONG: dict[str, tuple[dict[str, Any] | str, str]] = {
    "layers without end": ({"num_hidden_layers": 10**11}, "got num_hidden_layers=100000000000, expected a whole number of at most 1000"),
    "as many of a part": ({"text_config": {"n_layer": 10**11}}, "got n_layer=100000000000, expected"),
    "one of a list": ({"num_key_value_heads": [2, 10**9]}, "got num_key_value_heads=1000000000, expected"),
    "no heads": ({"num_attention_heads": 0}, "got num_attention_heads=0, expected a whole number of at least 1"),
    "a word": ({"hidden_size": "wide"}, "got hidden_size='wide', expected a whole number"),
    "half a head": ({"head_dim": 0.5}, "got head_dim=0.5, expected a whole number"),
    "400 digits": ({"vocab_size": 10**400}, "is no finite number of at most 64 bits"),
    "a wrong type elsewhere": ({"rope_parameters": 3}, "Validation error for field 'rope_parameters'"),
    "a part that is none": ({"text_config": 3}, "its config has 3 inside"),
    "no kind of number": ({"dtype": 3}, "its config has 3 inside"),
    "heads in no whole groups": ({"num_attention_heads": 3}, "got 3 heads, 2 kv heads and 85 channels each, expected whole groups"),
    "no object": ("[]", "with [], expected an object"),
    "nested": ("[" * 9999, "with more than 64 levels of JSON"),
    "nothing": ("", "that is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_config_is_one_line(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = WRONG[wrong]
    folder = folder_of(tmp_path, change if isinstance(change, str) else json.dumps(CONFIG | change))
    assert main(["info", "--model", str(folder)]) == 2
    ours = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnpred: ")]
    assert len(ours) == 1 and message in ours[0] and "Traceback" not in ours[0]


def test_weights_are_not_read_for_a_wrong_config(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config.json: got num_hidden_layers=-1, expected"):
        load_model(str(folder_of(tmp_path, json.dumps(CONFIG | {"num_hidden_layers": -1}))))


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, json.dumps(CONFIG))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UnsupportedModelError, match=r"expected a Hub id, a local folder, .*: ") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_of_every_family_passes(family: str, tmp_path: Path) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    check_config(str(tmp_path))
    assert load_config(str(tmp_path))[0].model_type == tiny_model(family).config.model_type


def test_what_is_not_there_is_left_to_transformers(tmp_path: Path) -> None:
    check_config(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="expected a Hub id, a local folder"):
        load_config(str(tmp_path))
