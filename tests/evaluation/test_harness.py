"""lm-evaluation-harness on the demo LM: the same answers as its own model class at full budget, sparse steps at a small one.

Two tasks that generate and one of log-likelihoods, on local files. Runs where the extra `eval` is installed.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("accelerate", reason="needs the extra eval")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the harness's own warnings are not ours to end

DATA = Path(__file__).parent / "data"
SMALL = {"budget": 96, "num_sink_tokens": 16, "recent_window": 32, "history": 16}

SUMS = """
task: local_sums
fewshot_split: test
fewshot_config: {sampler: first_n}
num_fewshot: 4
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: 12, do_sample: false}
"""
NUMBERS = """
task: local_numbers
output_type: generate_until
doc_to_text: "{{input}}"
doc_to_target: "{{outputs[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
filter_list: [{name: word, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}]
"""
CHOICES = """
task: local_choices
output_type: multiple_choice
doc_to_text: "{{input}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
"""
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}, cache_dir: "{cache}"}}
test_split: test
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
TASKS = ["local_sums", "local_numbers", "local_choices"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks: sums as GSM8K has them; numbers hidden in text as RULER does, to be continued or to be chosen from."""
    from attnpred.evaluation.book import demo_book
    from attnpred.evaluation.facts import make_facts

    made = tmp_path_factory.mktemp("harness")
    rows = []
    for i in range(3):
        facts = make_facts(random.Random(i), 3)
        parts = demo_book()[i * 9000 : i * 9000 + 1200].split(". ")
        for j, fact in enumerate(facts):
            parts.insert((j + 1) * len(parts) // 4, fact.statement.strip().rstrip("."))
        text = ". ".join(parts) + "." + facts[0].question
        rows.append({"input": text, "outputs": [facts[0].answer.strip()], "choices": [f.answer.strip() for f in facts]})
    (made / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        "sums": (SUMS, DATA / "gsm8k.jsonl", "exact_match"),
        "numbers": (NUMBERS, made / "numbers.jsonl", "exact_match"),
    }
    for name, (text, file, metric) in (files | {"choices": (CHOICES, made / "numbers.jsonl", "acc")}).items():
        (made / f"{name}.yaml").write_text(text + COMMON.format(file=file, cache=made / "cache", metric=metric))
    return made


@pytest.fixture
def stock() -> Any:
    from lm_eval.models.huggingface import HFLM

    from attnpred.hf import DEMO_MODEL

    return HFLM(pretrained=str(DEMO_MODEL), device="cpu", dtype="float32")


@pytest.fixture
def made() -> Iterator[Any]:
    """Makes models, and gives them back as they were."""
    from attnpred.evaluation.harness import AttnpredLM

    found: list[Any] = []

    def make(**settings: Any) -> Any:
        found.append(AttnpredLM(**({"pretrained": "demo", "device": "cpu"} | settings)))
        return found[-1]

    yield make
    for model in found:
        model.detach()


def evaluated(model: Any, folder: Path, tasks: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return (scores, responses, config)."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    samples = {task: [sample["resps"] for sample in rows] for task, rows in out["samples"].items()}
    return out["results"], samples, out["config"]


def scores(results: dict[str, Any]) -> dict[str, Any]:
    return {task: {k: v for k, v in row.items() if isinstance(v, float)} for task, row in results.items()}


def test_full_budget_is_the_stock_model(folder: Path, stock: Any, made: Any) -> None:
    wanted, texts, _ = evaluated(stock, folder, TASKS)
    results, given, config = evaluated(made(budget=1.0), folder, TASKS)
    assert scores(results) == scores(wanted)
    assert results["local_numbers"]["exact_match,word"] > 0.5  # there is something to lose
    for task in TASKS[:2]:
        assert given[task] == texts[task]
    for mine, theirs in zip(given["local_choices"], texts["local_choices"], strict=True):
        for (likelihood, greedy), (other, other_greedy) in zip(
            (r[0] for r in mine), (r[0] for r in theirs), strict=True
        ):
            assert float(likelihood) == pytest.approx(float(other), abs=1e-3) and greedy == other_greedy
    counters = config["attnpred"]["stats"]
    assert counters["generated"]["sparse_steps"] == 0 and counters["generated"]["steps"] > 0


def test_a_small_budget_takes_sparse_steps(folder: Path, made: Any) -> None:
    model = made(policy="quest", **SMALL)
    _, given, config = evaluated(model, folder, TASKS)
    for counters in config["attnpred"]["stats"].values():
        assert counters["sparse_steps"] > 0 and counters["fallbacks"] == 0
        assert counters["tokens_attended"] < counters["context_tokens"]
    assert config["attnpred"]["policy"] == "quest" and config["attnpred"]["settings"]["budget"] == 96
    _, dense, _ = evaluated(made(budget=1.0), folder, TASKS)
    assert given["local_choices"] != dense["local_choices"]  # log-likelihoods come from the small budget as well


def test_an_attached_model_is_a_pretrained_one(folder: Path, stock: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    import attnpred
    from attnpred.hf import load_model

    wanted, texts, _ = evaluated(stock, folder, TASKS[:2])
    model, tokenizer = load_model("demo", device="cpu")
    with attnpred.attach(model, budget=1.0) as attached:
        results, given, _ = evaluated(HFLM(pretrained=model, tokenizer=tokenizer), folder, TASKS[:2])
        assert scores(results) == scores(wanted) and given == texts
        assert attached.stats()["total"]["steps"] > 0
    with attnpred.attach(model, policy="quest", **SMALL) as attached:
        evaluated(HFLM(pretrained=model, tokenizer=tokenizer), folder, TASKS[:2])
        assert attached.stats()["total"]["sparse_steps"] > 0


def test_batches_are_answered_as_single_requests(folder: Path, stock: Any, made: Any) -> None:
    _, single, _ = evaluated(stock, folder, TASKS[:2])
    _, batched, _ = evaluated(made(budget=1.0, batch_size=3), folder, TASKS[:2])
    assert single == batched


def test_the_model_is_given_back(made: Any) -> None:
    model = made(policy="quest", **SMALL)
    before = model.model.config._attn_implementation
    model.detach()
    assert "generate" not in vars(model.model) and model.model.config._attn_implementation != before


def test_wrong_arguments_are_refused(made: Any) -> None:
    from attnpred.errors import ConfigError
    from attnpred.hf import load_model

    for arguments, message in (
        ({"budget": 10}, "got budget=10, expected at least"),
        ({"policy": "best"}, "got policy 'best', expected one of"),
        ({"pretrained": load_model("demo")[0]}, "got a loaded Qwen2ForCausalLM, expected a name"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**arguments)


def test_the_command_line_knows_the_model(folder: Path, tmp_path: Path) -> None:
    words = ["--model", "attnpred", "--model_args", "pretrained=demo,policy=quest,budget=160", "--device", "cpu"]
    words += ["--tasks", "local_numbers", "--include_path", str(folder), "--output_path", str(tmp_path)]
    command = [sys.executable, "-m", "attnpred.evaluation.harness", *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    (file,) = tmp_path.glob("*/results_*.json")
    config = json.loads(file.read_text())["config"]
    assert config["attnpred"]["policy"] == "quest" and config["attnpred"]["stats"]["generated"]["sparse_steps"] > 0


def test_the_command_line_says_in_one_line_what_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnpred.evaluation.harness import main

    words = ["--model", "attnpred", "--model_args", "pretrained=demo,budget=10", "--tasks", "local_numbers"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--device", "cpu", "--include_path", str(folder)])
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("attnpred: got budget=10, expected at least 80")
