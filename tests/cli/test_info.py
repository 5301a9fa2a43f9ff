"""`attnpred info`: what there is, and what a model's cache takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig, MistralConfig

from attnpred.cli.main import main
from attnpred.config import OFFLOADS, CacheConfig
from attnpred.hf import load_model, make_policy
from attnpred.hf.dtype import stored_dtype
from attnpred.hf.load import load_config
from attnpred.hf.sizes import estimate_for
from attnpred.kernels import DECODE_BACKENDS, DIGEST_BACKENDS
from attnpred.policies import POLICIES
from attnpred.store.estimate import readable
from tests.models import BASE


def test_json_is_one_object_on_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(facts["policies"]) == set(POLICIES) and set(facts["kernels"]) == {*DECODE_BACKENDS, *DIGEST_BACKENDS}
    assert {"attnpred", "torch", "transformers", "python"} == set(facts["versions"])
    assert "cpu" in facts["devices"]


def test_every_policy_and_kernel_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(facts["policies"].values()) and all(facts["kernels"].values())


def test_text_names_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in POLICIES)


def test_policies_are_a_table_from_their_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "policies", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["policies"]
    assert list(rows) == list(POLICIES)
    for name, row in rows.items():
        kind = POLICIES[name]
        assert (row["kind"], row["cost"], row["source"]) == (kind.kind, kind.cost, kind.source) and row["about"]
        assert row["needs_query"] == (kind.needs_query or kind.corrects)
        assert not (row["prefetchable"] and (kind.needs_query or kind.is_dense))
    # 16-bit keys of 128 dimensions, blocks of 16: their bounds are 2 * 256 bytes, their mean 256, a row of fp32 is 4
    state = {name: row["state_bytes_per_token"] for name, row in rows.items()}
    assert (state["quest"], state["freekv"], state["mean_key"], state["ema"], state["recycled"]) == (
        32,
        32,
        16,
        0.25,
        0.25,
    )
    assert state["full"] == state["oracle"] == 0 < state["predicted"] < 16


def test_the_table_of_policies_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "policies"]) == 0
    head, *rows, note = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["policy", "kind", "bytes/token"] and "512" in note
    assert [row.split()[0] for row in rows] == list(POLICIES)
    places = [head.index(title) for title in ("kind", "bytes/token", "prefetch", "source", "cost")]
    assert all(row[place - 1] == " " != row[place] for row in rows for place in places)


def sizes(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what `attnpred info --model ... --json` says of the demo model, or of another one that is given."""
    model = () if "--model" in arguments else ("--model", "demo")
    assert main(["info", *model, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_tiers_are_those_that_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    tiers = json.loads(capsys.readouterr().out)["tiers"]
    assert {None, *tiers} == set(OFFLOADS) and all(f"--offload {name}" in about for name, about in tiers.items())


def test_what_is_shown_is_for_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "for tests" not in shown and not [
        word for word in ("fake", "sparse_decode", "contract", "any_of:", "shots:") if word in shown
    ]


def test_a_models_cache_is_what_the_estimate_says(capsys: pytest.CaptureFixture[str]) -> None:
    settings = CacheConfig(budget=512, offload="cpu", offload_dtype="int8", dense_layers=1)
    config, chosen = load_config("demo")
    policy = make_policy("quest", None, config, settings)
    expected = estimate_for(config, settings, policy, chosen.dtype, 6000, batch=2)
    found = sizes(
        capsys,
        *("--context", "6000", "--budget", "512", "--policy", "quest", "--offload", "cpu"),
        *("--offload-dtype", "int8", "--dense-layers", "1", "--batch", "2"),
    )
    assert found["bytes"] == expected.as_dict()
    assert found["times_less"] == expected.full / expected.fast
    del found["bytes"], found["times_less"]
    assert found == {
        "model": "demo",
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "dtype_why": chosen.why,
        "context": 6000,
        "batch": 2,
        "policy": "quest",
        "budget": 512,
        "dense_layers": 1,
        "offload": "cpu",
        "offload_dtype": "int8",
    }


def test_what_is_left_out_has_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    found = sizes(capsys)
    assert (found["context"], found["offload"], found["policy"], found["batch"]) == (8192, "disk", "predicted", 1)
    assert (found["budget"], found["dense_layers"], found["offload_dtype"]) == (1024, 0, None)
    assert found["bytes"]["host"] == 0 < found["bytes"]["disk"]


def test_single_layers_can_be_dense(capsys: pytest.CaptureFixture[str]) -> None:
    two, named, all_but = (sizes(capsys, "--policy", "quest", "--dense-layers", text) for text in ("2", "0,3", "4,"))
    assert (two["dense_layers"], named["dense_layers"], all_but["dense_layers"]) == (2, [0, 3], [4])
    assert two["bytes"] == named["bytes"] != all_but["bytes"]


def test_a_budget_is_a_share_up_to_one(capsys: pytest.CaptureFixture[str]) -> None:
    share, whole = sizes(capsys, "--budget", "0.25"), sizes(capsys, "--budget", "2048")
    assert (share["budget"], whole["budget"]) == (0.25, 2048) and isinstance(whole["budget"], int)
    assert share["bytes"] == whole["bytes"]


def test_offload_none_keeps_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = sizes(capsys, "--offload", "none")
    assert found["offload"] is None and found["bytes"]["pool"] == found["bytes"]["full"]


def test_the_text_says_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    found = sizes(capsys, "--offload", "none", "--policy", "streaming", "--dense-layers", "0")
    assert main(["info", "--model", "demo", "--offload", "none", "--policy", "streaming", "--dense-layers", "0"]) == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.replace("- ", "").splitlines()] == [
        ["demo,", "8192 tokens, batch 1"],
        ["dtype", f"{found['dtype']}: {found['dtype_why']}"],
        ["policy", "streaming, budget 1024, dense layers 0"],
        ["offload", "none, numbers as they are"],
        ["bytes"],
        ["full", f"cache   {readable(found['bytes']['full'])}"],
        ["fast", f"memory  {readable(found['bytes']['full'])}, 1.0 times less than the full cache"],
        ["pool", readable(found["bytes"]["full"])],
        *(["digests", "0 bytes"], ["tables", "0 bytes"], ["buffers", "0 bytes"]),
        ["host", "memory  0 bytes"],
        ["disk", "0 bytes"],
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's config without weights."""
    LlamaConfig(**BASE, dtype="bfloat16").save_pretrained(tmp_path)
    return tmp_path


def test_no_weights_are_needed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sizes(capsys, "--model", str(folder), "--policy", "ema", "--dtype", "bfloat16")
    assert (found["dtype"], found["context"]) == ("bfloat16", 512)
    assert found["bytes"]["full"] == 512 * 3 * 2 * (8 + 8) * 2


def test_the_demo_is_measured_in_the_dtype_it_runs_in() -> None:
    assert load_config("demo")[1].dtype == load_model("demo")[0].dtype


@pytest.mark.parametrize("top", [True, False], ids=["whole", "text"])
def test_a_model_of_several_parts_has_one_dtype(top: bool, tmp_path: Path) -> None:
    dtype = {"dtype": "bfloat16"}
    Gemma3Config(text_config=BASE | ({} if top else dtype), **(dtype if top else {})).save_pretrained(tmp_path)
    assert stored_dtype(load_config(str(tmp_path))[0]) == torch.bfloat16


def test_a_model_that_names_no_dtype_is_taken_for_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(**BASE).save_pretrained(tmp_path)
    assert sizes(capsys, "--model", str(tmp_path), "--policy", "ema")["dtype"] == "float32"


def test_a_model_without_full_attention_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MistralConfig(**BASE, sliding_window=24).save_pretrained(tmp_path)
    assert main(["info", "--model", str(tmp_path), "--policy", "ema"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"attnpred: got {tmp_path}, which has no full-attention layer, expected one that has: there is nothing to compress\n"
    )


MISTAKES = [
    (["kernels"], "got 'kernels', expected `policies` alone, or options alone"),
    (["policies", "--model", "demo"], "got policies with other options, expected `policies` alone"),
    (["--context", "100"], "got --context without --model, expected the model whose cache it is about: add --model"),
    (["--budget", "512"], "got --budget without --model, expected"),
    (["--offload-dtype", "int8"], "got --offload-dtype without --model, expected"),
    (["--dense-layers", "1"], "got --dense-layers without --model, expected"),
    (["--dtype", "float32"], "got --dtype without --model, expected"),
    (["--model", "demo", "--context", "0"], "--context"),
    (["--model", "demo", "--batch", "0"], "--batch"),
    (["--model", "demo", "--dense-layers", "two"], "got dense_layers='two', expected a whole number of at least 0"),
    (["--model", "demo", "--budget", "0"], "got budget=0.0, expected"),
    (["--model", "demo", "--budget", "1.5"], "got budget=1.5, expected a share of at most 1.0"),
    (["--model", "demo", "--policy", "nix"], "got policy 'nix', expected one of"),
    (["--model", "demo", "--offload", "tape"], "got offload='tape', expected one of"),
    (["--model", "demo", "--offload-dtype", "int4"], "got offload_dtype='int4', expected one of"),
    (["--model", "demo", "--offload", "none", "--offload-dtype", "int8"], "got offload_dtype='int8' without offload"),
    (
        ["--model", "./no/such/folder"],
        "got model './no/such/folder', expected a Hub id, a local folder, a GGUF file or a name",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err
