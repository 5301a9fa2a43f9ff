"""What is trained with sharing is what runs with it, and a trial run measures both arms, before and after."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import attnpred
from attnpred.evaluation.book import demo_book
from attnpred.hf import DEMO_MODEL, fingerprint, load_model
from attnpred.kernels.shared import Split
from attnpred.predictor.layer_groups import LayerGroups, grouped
from recipes.demo_lm import model
from recipes.demo_lm.train import batch
from recipes.pod import adapt
from recipes.pod.adapt import main, mixing


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_model("demo", device="cpu")


@pytest.fixture
def groups(demo: tuple[Any, Any], tmp_path: Path) -> Path:
    """Return a file of groups of the demo LM: three of layers 2 to 4 in head 0, none in head 1."""
    similar = torch.eye(5).expand(2, 5, 5).clone()
    similar[0, 2:, 2:] = 0.4
    said: dict[str, Any] = {
        "base_model": "demo", "fingerprint": fingerprint(demo[0].config), "query_heads": 4, "kv_heads": 2,
        "layers": (0, 1, 2, 3, 4), "rows": 1,
    }  # fmt: skip
    grouped(similar, 0.3, **said).save(tmp_path / "groups.json")
    return tmp_path / "groups.json"


@torch.no_grad()
def test_training_computes_what_an_attached_model_computes(demo: tuple[Any, Any], groups: Path) -> None:
    lm, tokenizer = demo
    tokens = tokenizer(demo_book()[:900], return_tensors="pt")["input_ids"][:, :160]
    found = LayerGroups.load(groups)
    params = {name: tensor.float() for name, tensor in load_file(DEMO_MODEL / "model.safetensors").items()}
    positions = torch.arange(tokens.shape[1])[None].float()
    attend = mixing(found.leaders(), Split(4, 20))
    ours = model.logits(params, model.Shape(), tokens, positions, attend).float()
    dense = model.logits(params, model.Shape(), tokens, positions).float()
    with attnpred.attach(lm, policy="pod", layer_groups=groups, own_sinks=4, own_recent=20) as attached:
        theirs = lm(tokens, cache=attached.new_cache()).logits
    error, effect = (ours - theirs).norm() / theirs.norm(), (dense - theirs).norm() / theirs.norm()
    assert error < 0.03 and effect > 4 * error, f"{error:.4f} of {effect:.4f}"  # the recipe's numbers are bf16


@pytest.mark.slow
def test_a_trial_run_writes_losses_and_weights(groups: Path, tmp_path: Path, demo: tuple[Any, Any]) -> None:
    ids = np.asarray(demo[1](demo_book()[:60_000])["input_ids"], dtype=np.uint16)
    np.save(tmp_path / "train.npy", ids[: len(ids) // 2])
    np.save(tmp_path / "heldout.npy", ids[len(ids) // 2 :])
    short = "--tokens 3000 --length 250 --batch 2 --sinks 4 --recent 30 --delta 0.3 --lr 1e-3".split()
    result = main([*short, "--data", str(tmp_path), "--groups", str(groups), "--work", str(tmp_path / "work")])
    assert json.loads((tmp_path / "work" / "result.json").read_text())["after"].keys() == {"shared", "dense"}
    assert result["dropped"] == pytest.approx(0.2)
    before, after = result["before"], result["after"]
    assert before["shared"]["text"] > before["dense"]["text"]  # nobody taught it to share
    assert after["shared"]["shared"]["text"] < before["shared"]["text"]
    first, second = (load_file(tmp_path / "work" / f"{arm}.safetensors") for arm in ("shared", "dense"))
    assert first.keys() == second.keys() == load_file(DEMO_MODEL / "model.safetensors").keys()
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    groups: Path, tmp_path: Path, demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.asarray(demo[1](demo_book()[:30_000])["input_ids"], dtype=np.uint16)
    for name in ("train", "heldout"):
        np.save(tmp_path / f"{name}.npy", ids)
    short = "--tokens 1200 --length 200 --batch 1 --sinks 4 --recent 30 --delta 0.3 --lr 1e-3".split()
    options = [*short, "--data", str(tmp_path), "--groups", str(groups)]
    monkeypatch.setattr(adapt, "SAVE_SECONDS", -1)
    monkeypatch.setattr(adapt, "HELD_OUT", 2)
    whole = main([*options, "--work", str(tmp_path / "whole"), "--out", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())["after"] == whole["after"]

    calls = 0

    def stop_at_the_fifth(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return batch(*given)

    monkeypatch.setattr(adapt, "batch", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        main([*options, "--work", str(tmp_path / "again")])
    monkeypatch.setattr(adapt, "batch", batch)
    main([*options, "--work", str(tmp_path / "again")])
    for arm in ("shared", "dense"):
        first, second = (load_file(tmp_path / work / f"{arm}.safetensors") for work in ("whole", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_groups_that_share_nothing_are_refused(groups: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "heldout.npy", np.zeros(10, dtype=np.uint16))
    options = ["--data", str(tmp_path), "--groups", str(groups), "--work", str(tmp_path / "work"), "--delta", "0.9"]
    with pytest.raises(SystemExit, match="expected some of the demo LM that share"):
        main(options)
