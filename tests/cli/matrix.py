"""Every command against every bad input, as data: what is given, and that it must end in one line and exit code 2.

`cases(folder)` makes the files it needs in `folder`. Nothing here may reach a model's weights unless it says so: numbers,
outputs and files are checked before. `tests/cli/test_matrix.py` runs all of it, `tools.reliability` counts it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors.torch import save_file
from typer.models import OptionInfo

from attnpred.cli.main import COMMANDS
from attnpred.hf.named_models import DEMO_MODEL
from attnpred.predictor.pretrained import shipped
from attnpred.predictor.traces import TraceMeta, TraceWriter


@dataclass(frozen=True, slots=True)
class Case:
    """arguments: after `attnpred`. needs_model: what is wrong with it can only be found with a model at hand."""

    name: str
    arguments: tuple[str, ...]
    needs_model: bool = False


NUMBERS = {
    "no number": "x",
    "nothing": "",
    "NaN": "nan",
    "infinity": "inf",
    "beyond a float": "1e999",
    "thirty digits": "9" * 30,
    "thousands of digits": "9" * 5000,
    "far below zero": "-1e30",
}
METAVARS = ("INTEGER", "NUMBER", "NUMBERS", "LAYERS")

FILES: dict[str, Callable[[Path], object]] = {
    "nothing there": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a terabyte": lambda path: _with_holes(path),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "half of UTF-16": lambda path: path.write_bytes(b"\xff\xfe\x00\xd8\x00"),
    "empty": lambda path: path.touch(),
}
"""What is no text at all; a folder is one for some commands."""
JSONS: dict[str, Callable[[Path], object]] = {
    "words": lambda path: path.write_text("hello\n"),
    "nested deep": lambda path: path.write_text("[" * 99_999),
    "an unfinished object": lambda path: path.write_text('{"a": '),
    "a list": lambda path: path.write_text("[1, 2]"),
    "null": lambda path: path.write_text("null"),
    "an empty object": lambda path: path.write_text("{}"),
    "NaN": lambda path: path.write_text('{"a": NaN}'),
    "400 digits": lambda path: path.write_text('{"a": 1' + 400 * "0" + "}"),
    "half a letter": lambda path: path.write_text('{"a": "\\ud800"}'),
    "Latin-1": lambda path: path.write_bytes('{"é": 1}'.encode("latin-1")),
}
"""What is text, and no JSON that any command takes."""
OUTPUTS: dict[str, Callable[[Path], object]] = {
    "a device": lambda path: path.symlink_to("/dev/full"),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path),
    "in a missing folder": lambda path: path.parent.rmdir(),
    "below a file": lambda path: (path.parent.rmdir(), path.parent.touch()),
    "a name too long": lambda path: None,
}
"""What cannot be written to."""
MADE = {("capture", "--out"), ("report", "--figures"), ("train", "--out")}
"""Outputs that are folders, and made."""

BENCHMARKS = {
    "attention": ("--contexts", "--budgets", "--rounds", "--cold-mebibytes"),
    "selection": ("--contexts", "--rounds"),
    "decode": ("--contexts", "--budget", "--layers", "--rounds", "--steps"),
    "batches": ("--batches", "--context", "--layers", "--budget", "--rounds"),
    "offload": ("--context", "--budget", "--steps", "--rounds", "--churn", "--layers", "--demo-steps"),
    "memory": ("--context", "--budget", "--steps"),
    "rivals": ("--contexts", "--threads", "--rounds", "--steps"),
    "serve": ("--streams", "--context", "--tokens", "--budget"),
}
"""Options of each benchmark that take numbers."""
WITH_OUTPUT = ("attention", "selection", "decode", "batches", "rivals", "serve")
"""Benchmarks with `--out`."""


def _with_holes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def cases(folder: Path) -> Iterator[Case]:
    """Yield all cases; `folder` is empty."""
    good = Good(folder)
    yield from _numbers(good)
    yield from _benchmarks()
    yield from _words(good)
    yield from _files(good, folder)
    yield from _outputs(good, folder)
    yield from _rows(good, folder)


class Good:
    """Files that are right, and the arguments of every command that lets all but one thing be right."""

    def __init__(self, folder: Path) -> None:
        self.text, self.rows, self.traces = folder / "text.txt", folder / "rows.jsonl", folder / "traces"
        self.out = folder / "out"
        self.text.write_text("The mill stood by the river. " * 400)
        self.row = {
            "model": "m",
            "policy": "ema",
            "budget": 0.25,
            "task": "t",
            "metric": "accuracy",
            "value": 0.5,
            "n": 3,
        }
        self.rows.write_text(json.dumps(self.row) + "\n")
        meta = TraceMeta("m", "m", 16, 1, 1, 40, query_heads=1, head_dim=8, layer_ids="0")
        writer = TraceWriter(self.traces, meta)
        for name in ("a", "b"):
            rows, queries, keys = torch.zeros(1, 1, 40, 20), torch.zeros(1, 1, 40, 8), torch.zeros(1, 1, 300, 8)
            writer.add(name, rows, 260, queries, keys)
        text, out = str(self.text), str(self.out)
        self.commands: dict[str, tuple[str, ...]] = {
            "demo": ("demo", "--model", "demo", "--text", text),
            "generate": ("generate", "demo", "--prompt-file", text),
            "chat": ("chat", "demo", "--document", text),
            "serve": ("serve", "demo", "--port=0", "--folder", out),
            "capture": ("capture", "demo", "--text", text, "--out", out),
            "analyse-layers": ("analyse-layers", "demo", "--text", text, "--out", out),
            "eval": ("eval", "demo", "--policies", "ema", "--tasks", "perplexity", "--texts", text, "--out", out),
            "report": ("report", str(self.rows), "--out", out),
            "train": ("train", str(self.traces), "--out", out),
            "info": ("info", "--model", "demo"),
        }


def number_options(command: str) -> list[str]:
    """Return the options of a command that take numbers, from its own signature."""
    hints = get_type_hints(COMMANDS[command], include_extras=True)
    found = []
    for name, hint in hints.items():
        kind, *about = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        option = next((one for one in about if isinstance(one, OptionInfo)), None)
        if option is not None and (kind in (int, float, int | None, float | None) or option.metavar in METAVARS):
            spelled = [word for word in option.param_decls or () if word.startswith("--")]
            found.append(spelled[0] if spelled else "--" + name.replace("_", "-"))
    return found


def _numbers(good: Good) -> Iterator[Case]:
    for command, given in good.commands.items():
        more = ("--offload", "disk") if command in ("generate", "chat", "serve", "info") else ()
        for option, (kind, value) in product(number_options(command), NUMBERS.items()):
            if (option, kind) != ("--lr", "thirty digits"):  # a rate that only the loss can judge
                yield Case(f"{command}: {option} is {kind}", (*given, *more, f"{option}={value}"))
    for option in ("--lengths", "--budgets"):
        for kind, value in NUMBERS.items():
            yield Case(f"eval: {option} is {kind}", (*good.commands["eval"], f"{option}={value}"))
    for command, value in product(("generate", "chat"), ("-1", "1e-320", "0.001", "101")):
        yield Case(f"{command}: --temperature is {value}", (*good.commands[command], f"--temperature={value}"))
    for command in ("demo", "generate", "chat", "eval", "train"):
        for value in ("-1", str(1 << 64), str(1 << 63)):
            yield Case(f"{command}: --seed is {value}", (*good.commands[command], f"--seed={value}"))
    for command, value in product(("generate", "chat"), ("0", "-3", str(10**12))):
        yield Case(f"{command}: --max-new-tokens is {value}", (*good.commands[command], f"--max-new-tokens={value}"))
    for value in ("1", "0.5", "-13"):
        yield Case(f"demo: --compression is {value}", (*good.commands["demo"], f"--compression={value}"))
    for option, values in (
        ("--port", ("-1", "65536")),
        ("--streams", ("0",)),
        ("--queue", ("0",)),
        ("--seconds", ("0",)),
    ):
        for value in values:
            yield Case(f"serve: {option} is {value}", (*good.commands["serve"], f"{option}={value}"))
    yield Case("serve: another address without a key", (*good.commands["serve"], "--host", "0.0.0.0"))
    for option in ("context", "documents", "steps"):
        yield Case(f"demo: --{option} of another model", ("demo", "--model", "other", f"--{option}", "9"))


def _benchmarks() -> Iterator[Case]:
    """Benchmarks read their own options; whoever gets beyond these would measure for minutes."""
    for name, options in BENCHMARKS.items():
        for option, (kind, value) in product(options, NUMBERS.items()):
            yield Case(f"bench {name}: {option} is {kind}", ("bench", name, f"{option}={value}"))
        for option in (option for option in options if option not in ("--budget", "--budgets")):
            yield Case(f"bench {name}: {option} is too small", ("bench", name, f"{option}=-1"))
        yield Case(f"bench {name}: an unknown option", ("bench", name, "--no-such-option"))
        yield Case(f"bench {name}: something more", ("bench", name, "x"))
    for option in ("--shapes", "--dtypes"):
        yield Case(f"bench attention: {option} is unknown", ("bench", "attention", option, "tarot"))


def _words(good: Good) -> Iterator[Case]:
    strange = {"unknown": "tarot", "a zero byte's place": "\udcff\udcfe", "long": "x" * 5000, "newlines": "a\nb"}
    for command, option in (("generate", "--policy"), ("info", "--policy"), ("eval", "--policies"),
                            ("eval", "--tasks"), ("eval", "--suite"), ("train", "--predictor"), ("generate", "--offload"),
                            ("generate", "--offload-dtype"), ("demo", "--policies"), ("demo", "--offload"),
                            ("chat", "--policy"), ("chat", "--offload"), ("chat", "--weights"), ("serve", "--offload"),
                            ("generate", "--weights")):  # fmt: skip
        for kind, word in strange.items():
            needs = option in ("--policy", "--weights")
            yield Case(f"{command}: {option} is {kind}", (*good.commands[command], f"{option}={word}"), needs)
    for command in good.commands:
        yield Case(f"{command}: an unknown option", (*good.commands[command], "--no-such-option"))
        yield Case(f"{command}: something more", (*good.commands[command], "x", "y"))
    for kind, word in strange.items():
        yield Case(f"info: the model is {kind}", ("info", "--model", word))
        yield Case(f"models: what to do is {kind}", ("models", word))
        yield Case(f"models: what to fetch is {kind}", ("models", "fetch", word))
        yield Case(f"bench: the benchmark is {kind}", ("bench", word))
    yield Case("models: nothing to fetch", ("models", "fetch"))
    yield Case("models: two to fetch", ("models", "fetch", "smollm2", "smollm2"))
    yield Case("models: an unknown option", ("models", "--no-such-option"))
    yield Case("bench: no name", ("bench",))
    if find_spec("lm_eval") is None:  # else it has the harness's own options and messages
        yield Case("lm-eval: without its extra", ("lm-eval", "--model", "attnpred"))
    for nothing in ("", " , "):
        yield Case(f"demo: --policies is {nothing!r}", (*good.commands["demo"], "--policies", nothing))


def _files(good: Good, folder: Path) -> Iterator[Case]:
    """A bad file wherever a command reads one."""
    place, numbers = folder / "files", count()
    place.mkdir()

    def made(kinds: dict[str, Callable[[Path], object]], leave_out: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
        for kind, make in kinds.items():
            if kind not in leave_out:
                path = place / f"{next(numbers)}.txt"
                make(path)
                yield kind, path

    commands, out = good.commands, str(good.out)
    for kind, path in made(FILES):
        file, needs = str(path), kind in ("a terabyte", "bytes", "half of UTF-16", "empty")
        yield Case(f"generate: the prompt is {kind}", ("generate", "demo", "--prompt-file", file))
        yield Case(f"demo: the text is {kind}", ("demo", "--model", "demo", "--text", file), kind == "bytes")
        yield Case(f"chat: the document is {kind}", ("chat", "demo", "--document", file))
        if kind not in ("bytes", "half of UTF-16"):  # which may be keys
            yield Case(f"serve: the keys are {kind}", (*commands["serve"], "--key-file", file))
        yield Case(f"capture: the text is {kind}", ("capture", "demo", "--text", file, "--out", out), needs)
        yield Case(
            f"analyse-layers: the text is {kind}", ("analyse-layers", "demo", "--text", file, "--out", out), needs
        )
        yield Case(f"eval: the text is {kind}", (*commands["eval"], "--texts", file), True)
    for kind, path in [*made(FILES), *made(JSONS)]:
        file = str(path)
        yield Case(f"eval: the task's file is {kind}", (*commands["eval"], "--tasks", f"qa={file}"), True)
        yield Case(f"report: the rows are {kind}", ("report", file, "--out", out))
        yield Case(f"report: the bench is {kind}", (*commands["report"], "--bench", file))
        yield Case(f"report: the attention is {kind}", (*commands["report"], "--attention", file))
        yield Case(f"generate: the layer groups are {kind}", (*commands["generate"], "--layer-groups", file), True)
        if kind not in ("nothing there", "empty"):
            yield Case(f"eval: the file of rows is {kind}", (*commands["eval"], "--out", file))
        yield Case(f"train: the folder of traces is {kind}", ("train", file, "--out", out))
        for what, name, others in (
            ("traces", "traces.json", good.traces), ("predictor", "config.json", shipped()["attention-predictor-cnn"]), ("model", "config.json", DEMO_MODEL)
        ):  # fmt: skip
            inside = place / f"{what}-{path.stem}"
            inside.mkdir()
            for other in others.iterdir():
                (inside / other.name).symlink_to(path if other.name == name else other)
            arguments = {
                "traces": ("train", str(inside), "--out", out),
                "predictor": (*commands["generate"], "--predictor", str(inside)),
                "model": ("info", "--model", str(inside)),
            }
            if not (what == "predictor" and kind == "an empty object"):  # every field has a default
                yield Case(f"{what}: its {name} is {kind}", arguments[what], what == "predictor")


def _outputs(good: Good, folder: Path) -> Iterator[Case]:
    """A bad place wherever a command writes a file."""
    place = folder / "outputs"
    options = [("capture", "--out"), ("analyse-layers", "--out"), ("analyse-layers", "--figure"), ("eval", "--out"),
               ("report", "--out"), ("report", "--figures"), ("train", "--out"), ("demo", "--figure"),
               ("demo", "--attention"), *((f"bench {name}", "--out") for name in WITH_OUTPUT)]  # fmt: skip
    for command, option in options:
        for kind, make in OUTPUTS.items():
            if kind == "in a missing folder" and (command, option) in MADE:
                continue
            name = "n" * 300 if kind == "a name too long" else "n"
            path = (
                place
                / f"{command.replace(' ', '-')}{option}-{kind.replace(' ', '-')}"
                / f"{name}{'.svg' if option == '--figure' else ''}"
            )
            path.parent.mkdir(parents=True)
            make(path)
            given = good.commands[command] if command in good.commands else tuple(command.split())
            yield Case(f"{command}: {option} is {kind}", (*given, option, str(path)))


def _rows(good: Good, folder: Path) -> Iterator[Case]:
    """Rows whose values are of wrong types; predictors and figures with weights and sizes that nobody made."""
    values: list[Any] = [[], {}, "x", True, -1, 0.5, 1e308]
    for number, (key, value) in enumerate(
        product(("model", "policy", "task", "metric", "length", "n", "interval", "items", "config"), values)
    ):
        if (key in ("model", "policy", "task", "metric") and value == "x") or (key == "items" and value == []):
            continue
        if (key == "config" and value == {}) or (key == "interval" and value in ([], {})):
            continue
        path = folder / f"row{number}.jsonl"
        path.write_text(json.dumps(good.row | {key: value}) + "\n")
        yield Case(f"report: {key} is {value!r}", ("report", str(path), "--out", str(good.out)))
    for name, change in {
        "absurd": {"heads": 10**6},
        "large": {"heads": 4096, "rank": 65536},
        "of a word": {"rank": "x"},
    }.items():
        inside = folder / f"predictor-{name.replace(' ', '-')}"
        inside.mkdir()
        config = json.loads((shipped()["attention-predictor-cnn"] / "config.json").read_text())
        (inside / "config.json").write_text(json.dumps(config | change))
        (inside / "model.safetensors").symlink_to(shipped()["attention-predictor-cnn"] / "model.safetensors")
        yield Case(f"predictor: its sizes are {name}", (*good.commands["generate"], "--predictor", str(inside)), True)
    save_file({"true": torch.full((3, 4), float("nan"))}, folder / "nan.safetensors")
    yield Case(
        "report: the attention is NaN", (*good.commands["report"], "--attention", str(folder / "nan.safetensors"))
    )
