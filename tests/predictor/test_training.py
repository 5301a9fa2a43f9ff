"""Windows stand where inference stands; training learns, resumes bit for bit, and says how it compares."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from attnpred.cli.train import train
from attnpred.errors import ConfigError, PredictorError, TraceError
from attnpred.predictor import training, training_run
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.traces import TraceMeta, TraceReader, TraceWriter
from attnpred.predictor.training import TrainConfig, train_predictor
from attnpred.predictor.windows import Window, Windows, ema, recovered_share
from attnpred.shapes import num_blocks

SMALL = TrainConfig(
    steps=60, batch=4, lr=3e-3, history=8, sink_blocks=1, recent_blocks=1, eval_every=20, eval_batches=10
)
Write = Callable[..., Path]


def log_of(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same_files(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_window_is_what_inference_sees(persistent: Write) -> None:
    reader = TraceReader(persistent())
    windows = Windows(reader, history=8, sink_blocks=2, recent_blocks=3)
    trace = reader.load("document 1")
    window = windows.cut("document 1", 20, [3, 0])  # layer 1 head 1, layer 0 head 0
    blocks = num_blocks(trace.first + 20, 4)  # the query at first + 20 follows that many tokens
    assert window.blocks == blocks
    for i, (layer, head) in enumerate(((1, 1), (0, 0))):
        rows = trace.rows[layer, head, :, 2 : blocks - 3].float()
        assert torch.equal(window.target[i], rows[20])
        assert torch.equal(window.rows[i], rows[12:20])  # oldest first, the newest just before the target


def test_windows_leave_out_what_is_too_short(tmp_path: Path) -> None:
    meta = TraceMeta("toy", "toy", block_size=4, layers=1, heads=1, rows=20)
    writer = TraceWriter(tmp_path, meta)
    for name, first, steps in (("short", 90, 8), ("early", 0, 12), ("grows", 0, 20), ("good", 90, 9)):
        writer.add(name, torch.zeros(1, 1, steps, num_blocks(first + steps, 4)), first)
    windows = Windows(TraceReader(tmp_path), history=8, sink_blocks=1, recent_blocks=1)
    # a window of 3 blocks between 1 + 1 others needs 17 tokens before the query, and 8 rows
    assert windows.documents == ["good", "grows"]
    assert windows.cut("grows", 17, [0]).target.shape == (1, 3)
    with pytest.raises(TraceError, match=r"got 4 documents in .*, none with more than 20 rows"):
        Windows(TraceReader(tmp_path), history=20, sink_blocks=1, recent_blocks=1)


def test_ema_is_the_recursion() -> None:
    rows = torch.rand(3, 9, 5)
    state = rows[:, 0]
    for step in range(1, 9):
        state = 0.8 * state + 0.2 * rows[:, step]
    torch.testing.assert_close(ema(rows, 0.2), state)


def test_recovered_share_counts_the_mass() -> None:
    target = torch.tensor([[0.1, 0.4, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    share = recovered_share(scores, target, 2)
    assert share[0] == pytest.approx((0.1 + 0.4) / (0.4 + 0.2))
    assert share[1].isnan()
    assert recovered_share(1000 * target[:1], target[:1], 99)[0] == 1


def by_chance(traces: Path) -> float:
    """Return the share that two random blocks of every window recover."""
    windows = Windows(TraceReader(traces), 8, 1, 1)
    cuts = [windows.cut(name, 20, range(4)).target for name in windows.documents]
    generator = torch.Generator().manual_seed(0)
    return float(torch.cat([recovered_share(torch.rand(t.shape, generator=generator), t, 2) for t in cuts]).mean())


def test_training_learns_and_says_how_it_compares(persistent: Write, tmp_path: Path) -> None:
    traces, out = persistent(), tmp_path / "out"
    result = train_predictor(traces, out, SMALL, progress=False)
    log = log_of(out)
    assert [line["step"] for line in log] == [20, 40, 60]
    assert result.steps == 60 and result.parameters == 4833 and result.seconds > 0
    # It starts as a fair forecast already, so there is less to gain than from random weights.
    assert result.train_loss < 0.9 * float(log[0]["train_loss"])  # type: ignore[arg-type]
    assert result.recovery["cnn"] > result.recovery["last_step"]
    best = max(log, key=lambda line: line["recovery"]["cnn"])  # type: ignore[index]
    assert result.best_step == best["step"] and result.recovery == best["recovery"]
    assert result.recovery["cnn"] > 2 * by_chance(traces)
    assert by_chance(traces) < result.recovery["last_step"] < result.recovery["ema"] <= 1
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "checkpoint.safetensors",
        "config.json",
        "model.safetensors",
        "train_log.jsonl",
    ]
    predictor = Predictor.from_pretrained(out)
    assert predictor.config.block_size == 4 and predictor.config.history == 8
    assert predictor.config.base_model == "toy" and predictor.config.fingerprint == "toy/2/2"


def test_the_kept_weights_are_those_measured_best(
    persistent: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces, out, shorter = persistent(), tmp_path / "out", tmp_path / "shorter"
    train_predictor(traces, shorter, dataclasses.replace(SMALL, steps=40), progress=False)
    measured = iter((0.2, 0.5, 0.3))
    monkeypatch.setattr(training, "_recovery", lambda *_: dict.fromkeys(("cnn", "ema", "last_step"), next(measured)))
    result = train_predictor(traces, out, SMALL, progress=False)
    assert result.best_step == 40 and result.recovery["cnn"] == 0.5 and result.steps == 60
    kept, state = load_file(out / "model.safetensors"), load_file(shorter / "checkpoint.safetensors")
    assert all(torch.equal(tensor, state[f"weight/{name}"]) for name, tensor in kept.items())


def test_recovery_is_measured_at_the_budget_and_alike_every_time(
    persistent: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, counts, config = (
        Windows(TraceReader(persistent()), 8, 1, 1),
        [],
        dataclasses.replace(SMALL, recent_blocks=2),
    )
    real = recovered_share

    def counted(scores: torch.Tensor, target: torch.Tensor, count: int) -> torch.Tensor:
        counts.append(count)
        return real(scores, target, count)

    monkeypatch.setattr(training, "recovered_share", counted)
    names, predictor = windows.documents[:2], Predictor()
    first = training._recovery(predictor, windows, names, config)
    assert len(counts) == 30 and set(counts) == {3 - 1 - 2 + 1}  # 42 to 50 blocks / 13, and at least one is free
    assert training._recovery(predictor, windows, names, config) == first
    counts.clear()
    training._recovery(predictor, windows, names, dataclasses.replace(config, budget_fraction=0.5))
    assert min(counts) >= 42 // 2 - 3 and max(counts) <= 50 // 2 - 3


def test_the_card_repeats_the_log(persistent: Write, tmp_path: Path) -> None:
    result = train_predictor(persistent(), tmp_path / "out", SMALL, progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{result.recovery['cnn']:.4f} | {result.recovery['ema']:.4f} | {result.recovery['last_step']:.4f} |" in card
    assert f"| {result.steps} | {result.train_loss:.3e} |" in card
    assert f"those of step {result.best_step}." in card and "60 steps in" in card


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [0, 1, 2, 3])
def test_a_resumed_run_ends_with_the_same_bits(
    persistent: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Killed before the second log or checkpoint is written, before the first weights, or between two checkpoints."""
    traces, straight, resumed = persistent(), tmp_path / "straight", tmp_path / "resumed"
    train_predictor(traces, straight, SMALL, progress=False)
    with monkeypatch.context() as patch:
        if killed_at == 3:
            learn = training_run.TrainingRun.learn
            steps = iter(range(50))

            def die(self: training_run.TrainingRun, step: int, windows: list[Window]) -> float:
                if next(steps, None) is None:
                    raise Killed
                return learn(self, step, windows)

            patch.setattr(training_run.TrainingRun, "learn", die)
        else:
            module, name = [
                (training_run, "write_text"),
                (Predictor, "save_pretrained"),
                (training_run, "write_bytes"),
            ][killed_at]
            real, calls = getattr(module, name), iter(range(killed_at != 1))

            def once(*args: object, **kwargs: object) -> object:
                if next(calls, None) is None:
                    raise Killed
                return real(*args, **kwargs)

            patch.setattr(module, name, once)
        with pytest.raises(Killed):
            train_predictor(traces, resumed, SMALL, progress=False)
    result = train_predictor(traces, resumed, SMALL, progress=False)
    assert log_of(resumed) == log_of(straight)
    assert same_files(resumed / "model.safetensors", straight / "model.safetensors")
    assert same_files(resumed / "checkpoint.safetensors", straight / "checkpoint.safetensors")
    assert result.steps == 60


def test_a_finished_run_can_be_made_longer_but_not_changed(persistent: Write, tmp_path: Path) -> None:
    traces, out, straight = persistent(), tmp_path / "out", tmp_path / "straight"
    short = dataclasses.replace(SMALL, steps=40)
    train_predictor(traces, out, short, progress=False)
    again = train_predictor(traces, out, short, progress=False)  # nothing left to do
    assert again.steps == 40 and [line["step"] for line in log_of(out)] == [20, 40]
    train_predictor(traces, out, SMALL, progress=False)
    train_predictor(traces, straight, SMALL, progress=False)
    assert same_files(out / "checkpoint.safetensors", straight / "checkpoint.safetensors")
    with pytest.raises(PredictorError, match=r"of a run with lr=0\.003, expected 0\.1: use another --out"):
        train_predictor(traces, out, dataclasses.replace(SMALL, lr=0.1), progress=False)
    with pytest.raises(PredictorError, match="of a run with documents="):
        train_predictor(persistent(6), out, SMALL, progress=False)
    for name in ("train_log.jsonl", "model.safetensors"):
        (out / name).rename(tmp_path / name)
        with pytest.raises(PredictorError, match=r"got a damaged .*, expected a run to resume"):
            train_predictor(traces, out, SMALL, progress=False)
        (tmp_path / name).rename(out / name)
    (out / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(PredictorError, match="got a damaged"):
        train_predictor(traces, out, SMALL, progress=False)


def test_the_seed_decides_and_the_callers_generator_is_left_alone(persistent: Write, tmp_path: Path) -> None:
    traces, short = persistent(), dataclasses.replace(SMALL, steps=3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_predictor(traces, tmp_path / "one", short, progress=False)
    assert torch.equal(torch.rand(3), expected)
    train_predictor(traces, tmp_path / "two", short, progress=False)
    train_predictor(traces, tmp_path / "three", dataclasses.replace(short, seed=1), progress=False)
    assert same_files(tmp_path / "one" / "checkpoint.safetensors", tmp_path / "two" / "checkpoint.safetensors")
    assert not same_files(tmp_path / "one" / "checkpoint.safetensors", tmp_path / "three" / "checkpoint.safetensors")


def test_what_cannot_be_trained_is_said(persistent: Write, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="got 1 usable documents"):
        train_predictor(persistent(1), tmp_path / "out", SMALL, progress=False)
    empty = TraceWriter(tmp_path / "empty", TraceMeta("toy", "toy", 4, 1, 1, 20))
    for name in ("a", "b"):
        empty.add(name, torch.zeros(1, 1, 20, 30), 90)
    with pytest.raises(TraceError, match="without any attention"):
        train_predictor(tmp_path / "empty", tmp_path / "out", SMALL, progress=False)
    with pytest.raises(PredictorError, match="expected a number: lower lr"):
        train_predictor(persistent(), tmp_path / "wild", dataclasses.replace(SMALL, lr=1e30), progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 1.5),
        ("history", True),
        ("seed", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("validation", 1),
    ],
)
def test_settings_are_checked(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"got {field}={value}"):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_the_command_prints_one_json_object(persistent: Write, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(train)
    options = "--predictor cnn --steps 4 --batch 2 --history 8 --sink-tokens 4 --recent-tokens 4".split()
    folder, out = str(persistent()), str(tmp_path / "out")
    done = CliRunner().invoke(app, [folder, "--out", out, *options, "--json"], catch_exceptions=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and result["steps"] == 4 and result["parameters"] == 4833 and result["out"] == out
    assert result["train_loss"] > 0 and result["seconds"] > 0
    assert set(result["recovery"]) == {"cnn", "ema", "last_step"}
    plain = CliRunner().invoke(app, [folder, "--out", out, *options], catch_exceptions=False)
    assert "4,833 parameters, 4 steps" in plain.stdout and "EMA of the rows" in plain.stdout
    with pytest.raises(ConfigError, match="got --sink-tokens 5, expected a multiple of the traces' block size 4"):
        CliRunner().invoke(app, [folder, "--out", out, "--sink-tokens", "5"], catch_exceptions=False)
