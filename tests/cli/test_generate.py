"""`attnpred generate`: the completion of stock `generate`, what was read, and one line for each mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnpred.cli.main import main
from attnpred.hf import DEMO_MODEL
from attnpred.predictor.pretrained import Predictor, PredictorConfig

TEXT = " ".join(
    f"The {word} stood by the old mill, and nobody knew why." for word in "clock key ship lantern gate".split()
)
SPARSE = [
    "--policy",
    "ema",
    "--budget",
    "64",
    "--num-sink-tokens",
    "16",
    "--recent-window",
    "16",
    "--dense-layers",
    "0",
]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def run(prompt_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function: further arguments to exit code, stdout, stderr."""

    def command(*arguments: str, model: str = "demo", file: Path = prompt_file) -> tuple[int, str, str]:
        code = main(["generate", model, "--prompt-file", str(file), "--max-new-tokens", "12", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def stock_completion(new: int = 12) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True))


def test_a_budget_for_all_prints_what_stock_generate_gives(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("--policy", "ema", "--budget", "1")
    assert code == 0 and out.strip() == stock_completion().strip() != ""
    code, again, err = run("--policy", "ema", "--budget", "4096")
    assert again == out and "note: budget 4096 holds all" in err


def test_json_is_the_last_line_and_has_text_and_counters(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run(*SPARSE, "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and len(out.splitlines()) == 1 and result["text"].strip()
    total = result["stats"]["total"]
    assert result["prompt_tokens"] > 64 and total["tokens_attended"] <= 64
    assert total["sparse_steps"] == total["steps"] == 5 * 11 and total["fallbacks"] == 0


def test_stats_go_to_stderr_and_the_text_to_stdout(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(*SPARSE, "--stats")
    assert code == 0 and out.strip() and "attended" not in out
    assert [line.split(":")[0] for line in err.splitlines() if line.startswith("layer")] == [
        *(f"layer   {i}" for i in range(5)),
        "layer all",
    ]


def test_weights_are_packed_and_counted(run: Callable[..., tuple[int, str, str]]) -> None:
    pytest.importorskip("numba")
    code, out, err = run(*SPARSE, "--weights", "int8", "--json", "--stats")
    packed = json.loads(out.splitlines()[-1])["stats"]["weights"]
    assert code == 0 and packed["kind"] == "int8" and packed["layers"] == 5 * 7 + 1 and packed["left"] == {}
    assert f"weights: {packed['layers']} layers as int8, {packed['bytes']:,} bytes" in err


def test_the_streamed_text_is_that_of_json(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run(*SPARSE)[1].strip() == json.loads(run(*SPARSE, "--json")[1])["text"].strip()


def test_a_seed_gives_the_same_sample_and_another_gives_another(run: Callable[..., tuple[int, str, str]]) -> None:
    texts = [run(*SPARSE, "--temperature", "1.5", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_predictor_of_ones_own_is_used(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = Predictor(PredictorConfig()).save_pretrained(tmp_path / "mine")
    code, out, _ = run(*SPARSE, "--policy", "predicted", "--predictor", str(folder), "--json")
    assert code == 0 and json.loads(out)["stats"]["total"]["sparse_steps"] == 5 * 11


def test_a_text_that_is_not_utf8_is_read_all_the_same(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Le café était fermé. ".encode("latin-1") * 3)
    assert run("--policy", "ema", file=path)[0] == 0


def test_the_shipped_predictor_is_the_default_and_fits_the_demo_model(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(*SPARSE[2:], "--json")
    assert code == 0 and json.loads(out)["stats"]["total"]["sparse_steps"] == 5 * 11
    assert "no predictor was trained" not in err


@pytest.fixture
def long_file(tmp_path: Path) -> Path:
    """A text of which the budget of `SPARSE` is a quarter."""
    path = tmp_path / "long.txt"
    path.write_text(" ".join([TEXT] * 4), encoding="utf-8")
    return path


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_with_a_slow_tier_the_text_is_the_same_and_what_it_did_is_counted(
    where: str, run: Callable[..., tuple[int, str, str]], long_file: Path, tmp_path: Path
) -> None:
    folder = ["--offload-dir", str(tmp_path / "kv")] if where == "disk" else []
    offload = ["--offload", where, *folder, "--prefill-chunk", "32"]
    plain = json.loads(run(*SPARSE, "--json", file=long_file)[1])
    code, out, err = run(*SPARSE, *offload, "--json", "--stats", file=long_file)
    result = json.loads(out)
    assert code == 0 and result["text"] == plain["text"]
    stats, total = result["stats"], result["stats"]["total"]
    assert 0 < total["hit_rate"] <= 1 and total["bytes_fetched"] > 0 and total["bytes_streamed"] > 0
    assert total["exposed_wait_ms_per_token"] == pytest.approx(total["exposed_wait_ms"] / 11)
    assert total["dense"] == {"several tokens in one call": 5 * (-(-result["prompt_tokens"] // 32) - 1)}
    assert stats["slow_bytes"] == {"host" if where == "cpu" else "disk": 5 << 20}
    assert "slow_bytes" not in plain["stats"] and "hit_rate" not in plain["stats"]["total"]
    for shown in (f"fast memory: {stats['fast_bytes']:,} bytes", f"{total['hit_rate']:.1%}", f"{5 << 20:,} bytes"):
        assert shown in err
    assert where == "cpu" or not list((tmp_path / "kv").iterdir())


def test_other_numbers_take_less(run: Callable[..., tuple[int, str, str]], long_file: Path) -> None:
    written = []
    for dtype in ([], ["--offload-dtype", "int8"], ["--offload-dtype", "fp8"]):
        out = run(*SPARSE, "--offload", "cpu", *dtype, "--json", file=long_file)[1]
        written.append(json.loads(out)["stats"]["total"]["bytes_written"])
    assert written[1] == written[2] < 0.3 * written[0]  # of four bytes one, and two scales of a token


def test_fewer_blocks_come_late_if_fewer_may(run: Callable[..., tuple[int, str, str]], long_file: Path) -> None:
    late = []
    for share in ("0", "1"):
        out = run(*SPARSE[2:], "--offload", "cpu", "--late-share", share, "--json", file=long_file)[1]
        late.append(json.loads(out)["stats"]["total"]["fetched_late"])
    assert late[0] < late[1]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown policy": (["--policy", "tarot"], "got policy 'tarot', expected one of full"),
    "budget 0": (["--budget", "0"], "got budget=0.0, expected a number of tokens"),
    "budget below 0": (["--budget", "-5"], "got budget=-5.0, expected a number of tokens"),
    "budget NaN": (["--budget", "nan"], "got budget=nan, expected a number of tokens"),
    "budget infinite": (["--budget", "inf"], "got budget=inf, expected a number of tokens"),
    "budget 1.5": (["--budget", "1.5"], "got budget=1.5, expected a share of at most 1.0"),
    "budget too small": (["--budget", "64"], "got budget=64, expected at least 80"),
    "block size that does not divide": (
        ["--block-size", "24"],
        "got num_sink_tokens=16, expected a multiple of block_size=24",
    ),
    "block size -1": (["--block-size", "-1"], "got block_size=-1, expected a whole number of at least 0"),
    "unknown offload": (["--offload", "tape"], "got offload='tape', expected one of None, 'cpu', 'disk'"),
    "unknown numbers": (["--offload", "cpu", "--offload-dtype", "int3"], "got offload_dtype='int3', expected one of"),
    "numbers of nothing": (["--offload-dtype", "int8"], "got offload_dtype='int8' without offload"),
    "a folder of nothing": (["--offload-dir", "/tmp"], "without offload, expected offload='cpu' or 'disk'"),
    "late share above 1": (["--late-share", "2"], "got late_share=2.0, expected a share from 0 to 1"),
    "a limit below 0": (["--fast-limit", "-1"], "got fast_limit=-1, expected a number of bytes"),
    "chunks of 0": (["--prefill-chunk", "0"], "got prefill_chunk=0, expected a whole number of at least 1"),
    "no new tokens": (["--max-new-tokens", "0"], "got max_new_tokens=0, expected a whole number of at least 1"),
    "endless tokens": (["--max-new-tokens", "1000000000000"], "expected a whole number of at most 16777216"),
    "a seed below 0": (["--seed", "-1"], "got seed=-1, expected a whole number of at least 0"),
    "a seed beyond 64 bits": (["--seed", str(1 << 64)], f"got seed={1 << 64}, expected a whole number of at most"),
    "a temperature below 0": (["--temperature", "-1"], "got temperature=-1.0, expected 0 for the likeliest token"),
    "a temperature of nothing": (["--temperature", "nan"], "got temperature=nan, expected 0 for the likeliest token"),
    "a temperature that underflows": (
        ["--temperature", "1e-320"],
        "expected 0 for the likeliest token, or 0.01 to 100",
    ),
    "unknown weights": (["--weights", "int3"], "got weights='int3', expected one of 'int8', 'int4', 'float', or None"),
    "missing predictor": (["--policy", "predicted", "--predictor", "/no/such/folder"], "got missing directory"),
}


def assert_one_line(result: tuple[int, str, str], message: str) -> None:
    """Loading shows its progress on stderr as well; the mistake itself is the last line there, and the only one of ours."""
    code, out, err = result
    ours = [line for line in err.splitlines() if line.startswith("attnpred: ")]
    assert (code, out) == (2, "") and len(ours) == 1 and err.endswith(ours[0] + "\n")
    assert message in ours[0] and "Traceback" not in err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_is_one_line(mistake: str, run: Callable[..., tuple[int, str, str]]) -> None:
    arguments, message = MISTAKES[mistake]
    assert_one_line(run("--policy", "ema", *arguments), message)


TOO_LITTLE = {
    "fast": (["--fast-limit", "1000"], "of fast memory, expected at most 1000 bytes"),
    "host": (["--offload", "cpu", "--host-limit", "1000"], "5.00 MiB of host memory, expected at most 1000 bytes"),
    "disk": (["--offload", "disk", "--disk-limit", "1000"], "5.00 MiB of disk, expected at most 1000 bytes"),
}


@pytest.mark.parametrize("tier", TOO_LITTLE)
def test_what_will_not_fit_is_one_line_before_the_first_token(
    tier: str, run: Callable[..., tuple[int, str, str]], long_file: Path
) -> None:
    arguments, message = TOO_LITTLE[tier]
    assert_one_line(run(*SPARSE, *arguments, file=long_file), message)


@pytest.mark.parametrize("content", [None, "", " \n\t\n"], ids=["missing", "empty", "blank"])
def test_a_prompt_that_is_not_there_is_one_line(
    content: str | None, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "other.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    message = (
        f"got {path} (No such file or directory), expected a text file"
        if content is None
        else f"got an empty prompt in {path}"
    )
    assert_one_line(run("--policy", "ema", file=path), message)


def test_a_folder_as_the_prompt_is_one_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert_one_line(run("--policy", "ema", file=tmp_path), "expected a text file")


def test_an_unknown_model_is_one_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """A path, so that nobody is asked over the network."""
    name = str(tmp_path / "no-such-model")
    assert_one_line(
        run("--policy", "ema", model=name),
        f"got model '{name}', expected a Hub id, a local folder, a GGUF file or a name",
    )


@pytest.mark.parametrize("kept", [0, 100, 19_000])
def test_a_truncated_predictor_is_one_line(kept: int, run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    folder = Predictor(PredictorConfig()).save_pretrained(tmp_path / "mine")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert_one_line(run("--policy", "predicted", "--predictor", str(folder)), f"got a damaged {weights}")


def test_a_predictor_for_other_blocks_is_one_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    folder = Predictor(PredictorConfig(block_size=32)).save_pretrained(tmp_path / "mine")
    assert_one_line(
        run("--policy", "predicted", "--predictor", str(folder)), "got a predictor for blocks of 32, expected 16"
    )
