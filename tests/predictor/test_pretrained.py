"""A predictor's way to disk and back, and what is said when that fails."""

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnpred.errors import OutputError, PredictorError, ShapeError
from attnpred.predictor.pretrained import NETWORKS, Predictor, PredictorConfig, model_card, shipped

CONFIG = PredictorConfig(block_size=32, history=48, base_model="owner/model", fingerprint="x/1", trained_on="prose")


@pytest.fixture
def predictor() -> Predictor:
    torch.manual_seed(1)
    return Predictor(CONFIG)


@pytest.fixture
def saved(predictor: Predictor, tmp_path: Path) -> Path:
    return predictor.save_pretrained(tmp_path / "deep" / "predictor")


def same(one: Predictor, other: Predictor) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def refused(path: Any, *parts: str) -> None:
    """Loading `path` fails with one line that holds every one of `parts`."""
    with pytest.raises(PredictorError) as caught:
        Predictor.from_pretrained(path)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_are_those_of_the_network_per_head(predictor: Predictor) -> None:
    rows = torch.rand(2, 3, 8, 5)
    scores = predictor(rows)
    assert scores.shape == (2, 3, 5)
    torch.testing.assert_close(scores[1, 2], predictor.network(rows[1, 2][None])[0])
    half = predictor(rows.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, predictor(rows.half().float()))


@pytest.mark.parametrize("width", [0, 1, 2])
def test_few_blocks_all_score_one(predictor: Predictor, width: int) -> None:
    assert torch.equal(predictor(torch.rand(2, 3, 8, width)), torch.ones(2, 3, width))
    assert not torch.equal(predictor(torch.rand(2, 3, 8, 3)), torch.ones(2, 3, 3))


def test_rows_need_four_dimensions(predictor: Predictor) -> None:
    with pytest.raises(ShapeError):
        predictor(torch.rand(3, 8, 5))


def test_round_trip_keeps_every_bit(predictor: Predictor, saved: Path) -> None:
    loaded = Predictor.from_pretrained(str(saved))
    assert loaded.config == CONFIG
    assert same(loaded, predictor)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_files_have_the_usual_permissions(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    modes = {path.stat().st_mode for path in (*saved.iterdir(), tmp_path / "usual")}
    assert len(modes) == 1


def test_an_interrupted_save_leaves_the_old_predictor(
    predictor: Predictor, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="got No space left on device for"):
        patch.setattr(os, "fsync", full_disk)
        Predictor(CONFIG).save_pretrained(saved)
    assert same(Predictor.from_pretrained(saved), predictor)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_missing_places_and_files_are_named(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "got missing directory", "nowhere", "expected a directory with config.json")
    refused(saved / "config.json", "got file")
    (saved / "model.safetensors").rename(tmp_path / "kept")
    refused(saved, "got no model.safetensors in")
    (saved / "config.json").unlink()
    refused(saved, "got no config.json in")


@pytest.mark.parametrize("size", [0, 7, 100, 15000])
def test_a_truncated_file_is_damaged(saved: Path, size: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused(saved, "got a damaged", "model.safetensors", "expected a safetensors file")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "that is not JSON"),
        ("\xff", "that is not JSON"),
        ("[]", "with a list, expected an object"),
        ('{"size": 1, "block_size": 16}', "with unknown keys ['size'], expected ['kind', 'block_size'"),
        ('{"kind": "lstm"}', "got kind='lstm', expected one of ['cnn', 'cnn-unpadded', 'seer-gate']"),
        ('{"format": 2}', "got format=2, expected 1: update attnpred"),
        ('{"block_size": 0}', "got block_size=0, expected a whole number of at least 1"),
        ('{"block_size": true}', "got block_size=True, expected a whole number"),
        ('{"history": "64"}', "got history='64', expected a whole number"),
        ('{"base_model": 3}', "got base_model=3, expected a text"),
        ('{"heads": 100000}', "got heads=100000, expected a whole number of at most 4096"),
        ('{"rank": 1' + 400 * "0" + "}", "is no finite number of at most 64 bits"),
        ('{"layers": "1' + 5000 * "0" + '"}', "expected different layer numbers"),
        ("[" * 9999, "with more than 64 levels of JSON"),
    ],
)
def test_a_wrong_config_is_explained(saved: Path, text: str, part: str) -> None:
    (saved / "config.json").write_text(text, encoding="latin-1")
    refused(saved, part, "config.json")


def test_sizes_that_the_weights_do_not_have_take_no_memory(saved: Path) -> None:
    absurd = {"kind": "seer-gate", "layers": "0 1 2", "heads": 4096, "head_dim": 65536, "rank": 65536}
    (saved / "config.json").write_text(json.dumps(absurd))
    refused(saved, "numbers, expected at least the 52,776,558,133,248 of its config")


def test_weights_that_nobody_trained_are_refused(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    for factor, said in ((1e30, "beyond 10000"), (math.nan, "not finite floats")):
        save_file({name: tensor * factor for name, tensor in tensors.items()}, saved / "model.safetensors")
        refused(saved, said)
    save_file({name: tensor.to(torch.float8_e5m2) for name, tensor in tensors.items()}, saved / "model.safetensors")
    refused(saved, "not finite floats")
    save_file({f"x{i}": torch.zeros(1) for i in range(10_000)}, saved / "model.safetensors")
    refused(saved, "and 9998 more")


def test_config_round_trip_and_defaults() -> None:
    assert PredictorConfig.from_json(CONFIG.to_json()) == CONFIG
    assert PredictorConfig.from_json("{}") == PredictorConfig()
    assert PredictorConfig().kind in NETWORKS


def test_wrong_tensors_are_listed(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["conv3.bias"]
    tensors |= {"conv4.bias": torch.zeros(1), "conv1.weight": torch.zeros(16, 1, 5, 5)}
    tensors |= {"conv1.bias": torch.full((16,), torch.nan), "conv2.bias": torch.zeros(32, dtype=torch.int64)}
    save_file(tensors, saved / "model.safetensors")
    refused(
        saved,
        "missing conv3.bias",
        "unexpected conv4.bias",
        "conv1.weight of shape (16, 1, 5, 5) instead of (16, 1, 3, 3)",
        "conv1.bias with values that are not finite floats",
        "conv2.bias with values that are not finite floats",
    )


def test_require_names_both_sizes(predictor: Predictor) -> None:
    predictor.require(32)
    with pytest.raises(PredictorError, match="got a predictor for blocks of 32, expected 16: set block_size=32"):
        predictor.require(16)


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict"])
def test_reads_the_authors_checkpoints(predictor: Predictor, tmp_path: Path, wrap: str | None) -> None:
    state = predictor.network.state_dict()
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "model.pth")
    loaded = Predictor.from_reference_checkpoint(tmp_path / "model.pth", CONFIG)
    assert same(loaded, predictor) and loaded.config == CONFIG


class Payload:
    """Unpickling this creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.mkdir, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_a_hostile_pickle_is_refused_and_not_run(predictor: Predictor, tmp_path: Path, writer: str) -> None:
    bomb, trace = tmp_path / "model.pth", tmp_path / "was-run"
    content = {**predictor.network.state_dict(), "conv4.bias": Payload(trace)}
    if writer == "pickle":
        bomb.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, bomb, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(PredictorError, match=r"model.pth' that is not plain tensors \(UnpicklingError\)"):
        Predictor.from_reference_checkpoint(bomb)
    assert not trace.exists()
    if writer == "torch":  # the payload is live: the permissive reader runs it
        torch.load(bomb, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (torch.zeros(3), "something else than named tensors"),
        ({"conv1.weight": 1.0}, "something else than named tensors"),
        ({0: torch.zeros(1)}, "something else than named tensors"),
        ({"conv1.weight": torch.zeros(16, 1, 3, 3)}, "missing conv1.bias, missing conv2.weight"),
        ({"module.conv1.weight": torch.zeros(1)}, "unexpected module.conv1.weight"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, content: object, part: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(PredictorError, match=part):
        Predictor.from_reference_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_noise_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(PredictorError, match="is not plain tensors"):
        Predictor.from_reference_checkpoint(tmp_path / "model.pth")
    with pytest.raises(PredictorError, match="got no file"):
        Predictor.from_reference_checkpoint(tmp_path / "other.pth")


def test_shipped_lists_the_folders_of_the_package() -> None:
    for name, path in shipped().items():
        assert path.name == name
        assert isinstance(Predictor.from_pretrained(path), Predictor)


def test_a_hub_id_is_downloaded(saved: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        asked.append((repo_id, filename, revision))
        return str(saved / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(Predictor.from_pretrained("owner/name", revision="v1"), predictor)
    assert asked == [("owner/name", "config.json", "v1"), ("owner/name", "model.safetensors", "v1")]


def test_an_unreachable_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    refused("owner/name", "got no config.json from 'owner/name' (LocalEntryNotFoundError: no connection)")


class FakeApi:
    """Stands for the Hub: keeps what was uploaded."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    fails = False

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.fails:
            raise ConnectionError("401 Unauthorized")
        assert private and exist_ok
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert commit_message
        FakeApi.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def test_push_uploads_weights_config_and_card(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    assert predictor.push_to_hub("owner/name", private=True) == "https://huggingface.co/owner/name"
    assert sorted(FakeApi.files) == ["README.md", "config.json", "model.safetensors"]
    assert FakeApi.files["README.md"].decode() == model_card(CONFIG)
    assert json.loads(FakeApi.files["config.json"])["block_size"] == 32
    monkeypatch.setattr(FakeApi, "fails", True)
    with pytest.raises(PredictorError, match=r"got no upload to 'owner/name' \(ConnectionError: 401 Unauthorized\)"):
        predictor.push_to_hub("owner/name", private=True)


def test_the_card_tells_the_facts() -> None:
    card = model_card(CONFIG, "## More")
    assert card.startswith("---\nlibrary_name: attnpred\n") and "\nbase_model: owner/model\n" in card
    assert "* Trained on: prose" in card and card.endswith("\n## More\n")
    assert "base_model:" not in model_card(PredictorConfig(base_model="a model"))


def test_what_was_changed_after_it_was_saved_is_refused(saved: Path) -> None:
    """A config that would do, and weights of the right shape, but not those that were saved."""
    text, data = (saved / "config.json").read_text(), (saved / "model.safetensors").read_bytes()
    (saved / "config.json").write_text(text.replace('"history": 48', '"history": 49'))
    refused(saved, "whose config.json or model.safetensors was changed after they were saved", "copy or train it again")
    (saved / "config.json").write_text(json.dumps(json.loads(text), indent=None))  # other spaces say the same
    Predictor.from_pretrained(saved)
    (saved / "model.safetensors").write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    refused(saved, "whose config.json or model.safetensors was changed after they were saved")


def test_a_predictor_of_another_program_needs_no_check_value(predictor: Predictor, saved: Path) -> None:
    save_file({name: x.contiguous() for name, x in predictor.network.state_dict().items()}, saved / "model.safetensors")
    assert same(Predictor.from_pretrained(saved), predictor)


def test_shipped_predictors_have_a_check_value() -> None:
    for folder in shipped().values():
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert "check" in file.metadata()
