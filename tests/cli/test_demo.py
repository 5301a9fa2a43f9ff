"""`attnpred demo --model demo`: one comparison, as a table and as JSON with all keys; its figures agree."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnpred.cli.demo import EMBEDDED
from attnpred.cli.demo_embedded import LONGEST
from attnpred.cli.main import main
from attnpred.config import CacheConfig
from attnpred.evaluation.comparison import demo_settings
from attnpred.evaluation.facts import make_facts
from attnpred.hf.load import load_config
from attnpred.report.attention import load_attention

SMALL = ["--model", "demo", "--context", "1024", "--documents", "1", "--steps", "8", "--compression", "4"]
KV_BYTES = 5 * 2 * 2 * 64 * 4  # of a token: layers, kv heads, keys and values, numbers of fp32

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function: arguments after those of `SMALL` to exit code, stdout, stderr; no file is left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(["demo", *SMALL, *arguments])
        said = capsys.readouterr()
        assert not list(tmp_path.glob("cache/attnpred/kv/*"))
        return code, said.out, said.err

    return command


def assert_promised(result: dict[str, Any]) -> None:
    promised = {
        "context_tokens",
        "budget_tokens",
        "compression",
        "full",
        "predicted",
        "attention_recovery",
        "recovery_ratio",
        "figure",
    }
    assert promised <= set(result)
    for side in ("full", "predicted"):
        assert {"correct", "total", "bits_per_byte", "read_bytes_per_step", "ms_per_token", "fast_bytes"} <= set(
            result[side]
        )
        assert 0 <= result[side]["correct"] <= result[side]["total"] == 4
        assert result[side]["bits_per_byte"] > 0 and result[side]["ms_per_token"] > 0
    assert 0 < result["attention_recovery"] <= 1 + 1e-6 and 0 < result["recovery_ratio"] <= 1 + 1e-6
    assert result["compression"] == result["full"]["read_bytes_per_step"] / result["predicted"]["read_bytes_per_step"]


@pytest.mark.slow
def test_json_has_every_promised_key_and_the_figures_agree(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, numbers = tmp_path / "attention.png", tmp_path / "attention.safetensors"
    code, out, err = run("--policies", "ema", "--figure", str(picture), "--attention", str(numbers), "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert_promised(result)
    assert result["context_tokens"] == 1024 and result["budget_tokens"] == 256 and result["policy"] == "ema"
    # 7 steps of one token follow the text, at 1025 to 1031 tokens; the full cache reads all of them.
    assert result["full"]["read_bytes_per_step"] == 1028 * KV_BYTES
    assert result["full"]["tokens_attended"] == 1028
    assert result["full"]["fast_bytes"] >= 1031 * KV_BYTES
    # Of every head 17 slots of 16 tokens, the tables of where the 65 blocks lie, and what the policy remembers of each.
    assert 17 * 16 * KV_BYTES < result["predicted"]["fast_bytes"] < 1.2 * 17 * 16 * KV_BYTES
    assert result["offload"] == "disk" and result["late_share"] == 0.06
    assert 0.9 < result["predicted"]["hit_rate"] <= 1 and result["predicted"]["exposed_wait_ms"] > 0
    assert "hit_rate" not in result["full"]
    assert 224 < result["predicted"]["tokens_attended"] <= 256
    # No calibration row falls into 7 steps, and a step reads whole blocks: up to 15 tokens more than it attends to.
    blocks = [1 + (16 - 1 - 3) + (-(-n // 16) - (n - 32) // 16) for n in range(1025, 1032)]
    assert result["predicted"]["read_bytes_per_step"] == sum(blocks) / 7 * 16 * KV_BYTES
    assert result["figure"] == str(picture) and picture.read_bytes().startswith(b"\x89PNG")
    table = "\n".join(out.splitlines()[:-1])
    assert f"{result['full']['correct']} of 4" in table and f"{result['compression']:.1f} times less KV" in table
    assert f"{result['predicted']['fast_bytes']:,}" in table and f"{result['predicted']['hit_rate']:.1%}" in table
    assert result["attention"] == str(numbers) and load_attention(numbers).title.endswith("1024 tokens of context")
    assert (
        str(picture) in table
        and f"Attention: {numbers}" in table
        and "Traceback" not in err
        and (tmp_path / "cache/attnpred/kv").is_dir()
    )


@pytest.mark.slow
def test_in_memory_nothing_is_fetched_and_the_figures_are_the_same(run: Run, tmp_path: Path) -> None:
    found = {
        where: json.loads(run("--policies", "ema", "--offload", where, "--json")[1].splitlines()[-1])
        for where in ("none", "cpu")
    }
    none, host = (found[where]["predicted"] for where in ("none", "cpu"))
    assert found["none"]["late_share"] is None and found["none"]["offload"] is None and "hit_rate" not in none
    assert none["fast_bytes"] > found["none"]["full"]["fast_bytes"] > 3 * host["fast_bytes"]
    for key in ("correct", "bits_per_byte", "read_bytes_per_step", "tokens_attended"):
        assert none[key] == host[key]
    for key in ("compression", "attention_recovery", "recovery_ratio", "answers"):
        assert found["none"][key] == found["cpu"][key]
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_full_policy_compresses_nothing_and_answers_alike(run: Run) -> None:
    code, out, _ = run("--policies", "full", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["compression"] == 1.0 and result["figure"] is None
    for key in ("correct", "bits_per_byte", "read_bytes_per_step"):
        assert result["full"][key] == result["predicted"][key]
    assert all(answer["full"] == answer["predicted"] for answer in result["answers"])


@pytest.mark.slow
def test_the_shipped_predictor_is_the_default_and_fits_the_demo_model(run: Run) -> None:
    code, out, err = run("--json")
    assert code == 0 and "no predictor was trained" not in err
    assert_promised(json.loads(out.splitlines()[-1]))


@pytest.mark.slow
def test_a_text_of_ones_own_and_another_seed_are_used(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old mill stood by the river. Nobody knew why, and nobody asked. " * 120, encoding="utf-8")
    numbers = tmp_path / "attention.safetensors"
    code, out, err = run(
        "--policies", "streaming", "--text", str(text), "--seed", "7", "--json", "--attention", str(numbers)
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["attention"] is None and not numbers.exists()
    assert f"policy streaming forecasts nothing: {numbers} was not written" in err
    assert_promised(result)
    planted = make_facts(random.Random(7), 4)
    assert [row["expected"] for row in result["answers"]] == [fact.answer.strip() for fact in planted]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown policy": (["--policies", "tarot"], "got policy 'tarot', expected one of full"),
    "compression 1": (["--compression", "1"], "got compression=1.0, expected more than 1"),
    "compression NaN": (["--compression", "nan"], "got compression=nan, expected more than 1"),
    "compression too high": (["--compression", "13"], "use a lower --compression"),
    "all layers dense": (["--dense-layers", "5"], "use a lower --compression, fewer --dense-layers"),
    "calibration below 0": (["--calibration-interval", "-1"], "got calibration_interval=-1"),
    "unknown offload": (["--offload", "tape"], "got offload='tape', expected one of None, 'cpu', 'disk'"),
    "late share above 1": (["--late-share", "2"], "got late_share=2.0, expected a share from 0 to 1"),
    "missing text": (
        ["--text", "/no/such/text"],
        "got /no/such/text (No such file or directory), expected a text file",
    ),
    "figure in a missing folder": (
        ["--figure", "/no/such/folder/x.png"],
        "got No such file or directory for /no/such/folder/x.png",
    ),
    "attention in a missing folder": (["--attention", "/no/such/x"], "got No such file or directory for /no/such/x"),
    "no context": (["--context", "0"], "--context"),
    "no documents": (["--documents", "0"], "--documents"),
    "one step": (["--steps", "1"], "--steps"),
    "more than the model takes": (
        ["--context", "8129"],
        "got 8129 tokens of context and 8 steps, expected at most 8128",
    ),
    "steps beyond it": (["--steps", "8000"], "expected at most 192 before them: the model was made for 8192 in all"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_is_one_line_before_any_work(mistake: str, run: Run) -> None:
    arguments, message = MISTAKES[mistake]
    code, out, err = run("--policies", "ema", *arguments)
    ours = [line for line in err.splitlines() if line.startswith("attnpred: ")]
    assert (code, out) == (2, "") and len(ours) == 1 and err.endswith(ours[0] + "\n") and message in ours[0]
    assert "questions about" not in err and "Traceback" not in err


def test_a_text_shorter_than_the_context_is_one_line(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    code, out, err = run("--policies", "ema", "--text", str(text))
    assert (code, out) == (2, "") and "tokens of text, expected at least" in err


def test_by_itself_it_stays_within_what_the_model_was_made_for() -> None:
    """Else transformers alarms in the middle of the answers."""
    limit = load_config("demo")[0].max_position_embeddings
    assert EMBEDDED["context"] + max(EMBEDDED["steps"], LONGEST) <= limit


@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("calibration", [0, 8, 32])
@pytest.mark.parametrize("compression", [2.5, 3.5])
def test_the_settings_keep_the_promised_compression(compression: float, calibration: int, dense_layers: int) -> None:
    """Dense layers read everything, a calibration row reads all keys; all told it is the share that was asked for."""
    config = CacheConfig(
        budget=1.0,
        block_size=16,
        num_sink_tokens=16,
        recent_window=32,
        calibration_interval=calibration,
        dense_layers=dense_layers,
    )
    settings = demo_settings(config, 4096, compression, 5)
    sparse = settings.budget / 4096 + (0.5 / calibration if calibration else 0)
    share = (dense_layers + (5 - dense_layers) * sparse) / 5
    assert 1 / compression - 16 / 4096 <= share <= 1 / compression
