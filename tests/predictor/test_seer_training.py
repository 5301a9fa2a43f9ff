"""Training a gate: the loss is the divergence it is said to be, it falls, and held-out documents stay held out."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attnpred.errors import ConfigError, TraceError
from attnpred.predictor.edges import Edges
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.seer_fitting import GateSample, gate_loss, measured, train_gate
from attnpred.predictor.seer_gate import GateMap, pooled
from attnpred.predictor.seer_training import SeerConfig, train_seer
from attnpred.predictor.traces import TraceMeta, TraceWriter, split

P, LAYERS, HEADS, GROUP, DIM, FIRST, STEPS, SCALE = 4, 2, 2, 2, 8, 44, 16, 0.5
META = TraceMeta("toy", "toy/2", P, LAYERS, HEADS, STEPS, "a test", HEADS * GROUP, DIM, "0 2", SCALE)
TINY = SeerConfig(
    steps=3, rank=4, queries=5, sink_blocks=1, recent_blocks=1, budgets=(0.4, 0.6), validation=0.4
)  # fmt: skip
EDGES = Edges(P, 1, 1, SCALE)
NAMES = [f"document {number}" for number in range(5)]


def rows_of(queries: Tensor, keys: Tensor, first: int) -> Tensor:
    """Return the true block maxima [layers, Hkv, T, N]."""
    grouped = queries.unflatten(1, (HEADS, GROUP))
    logits = torch.einsum("lhgtd,lhsd->lhgts", grouped, keys) * SCALE
    positions = first + torch.arange(queries.shape[2])
    logits = logits.masked_fill(torch.arange(keys.shape[2]) > positions[:, None], -torch.inf)
    return torch.softmax(logits, -1).amax(2).unflatten(-1, (-1, P)).amax(-1)


def written(folder: Path, other: Collection[str] = (), names: Collection[str] = NAMES, first: int = FIRST) -> Path:
    """Write documents with their true rows; those named in `other` are different ones of the same name."""
    writer = TraceWriter(folder, META)
    for name in names:
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * (name in other))
        queries = torch.randn(LAYERS, HEADS * GROUP, STEPS, DIM, generator=generator)
        keys = torch.randn(LAYERS, HEADS, first + STEPS, DIM, generator=generator)
        writer.add(name, rows_of(queries, keys, first), first, queries, keys)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return all(torch.equal(left[name], right[name]) for name in left)


def random_gate(seed: int, spread: float = 1.0) -> GateMap:
    generator = torch.Generator().manual_seed(seed)
    return GateMap(
        spread * torch.randn(HEADS, GROUP * DIM, 4, generator=generator),
        spread * torch.randn(HEADS, 3 * DIM, 4, generator=generator),
    )


def sample(seed: int = 0, gate: GateMap | None = None, steps: int = STEPS) -> GateSample:
    """Return a document of one layer, whose rows are noise, or what `gate` says."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(HEADS, steps, GROUP * DIM, generator=generator)
    keys = pooled(torch.randn(HEADS, (FIRST + steps) // P, P, DIM, generator=generator))
    rows = torch.rand(HEADS, steps, keys.shape[1], generator=generator)
    if gate is not None:
        rows = torch.softmax(gate.logits(queries, keys @ gate.keys), -1)
    return GateSample(queries, keys, rows, FIRST + torch.arange(steps), rows)


def choosable(position: int) -> range:
    """Return the blocks that a query there has to choose from: neither sinks nor the recent window nor the open block."""
    return range(EDGES.sinks, (position + 1) // P - EDGES.recent)


def test_the_loss_is_the_divergence_from_the_true_maxima() -> None:
    gate, shown, picks = random_gate(1, 0.3), sample(), torch.tensor([3, 0, 11])
    total = 0.0
    for head in range(HEADS):
        for pick in picks.tolist():
            blocks = choosable(int(shown.positions[pick]))
            query = shown.queries[head, pick] @ gate.queries[head]
            logits = [float(query @ (shown.keys[head, block] @ gate.keys[head])) / 2 for block in blocks]
            rows = [float(shown.rows[head, pick, block]) for block in blocks]
            norm = math.log(sum(map(math.exp, logits)))
            for row, logit in zip(rows, logits, strict=True):
                target = row / sum(rows)
                total += target * (math.log(target) - (logit - norm))
    assert float(gate_loss(gate, shown, picks, EDGES)) == pytest.approx(total / (HEADS * len(picks)), rel=1e-4)


def test_a_gate_that_says_the_truth_has_no_loss_and_chooses_the_best() -> None:
    gate, every = random_gate(2, 0.3), torch.arange(STEPS)
    shown = sample(gate=gate)
    assert (
        abs(float(gate_loss(gate, shown, every, EDGES))) < 1e-5 < float(gate_loss(random_gate(3), shown, every, EDGES))
    )
    got, best = measured(gate, shown, EDGES, (0.3, 0.5))
    torch.testing.assert_close(got, best)
    got, best = measured(random_gate(3), shown, EDGES, (0.3, 0.5))
    assert (got < best).all()


def test_what_is_measured_is_a_sort() -> None:
    gate, shown, budget = random_gate(4), sample(5), 0.5
    assert shown.mass is not None
    want = [0.0, 0.0]
    count = int(budget * shown.keys.shape[1]) - EDGES.sinks - EDGES.recent - 1
    logits = gate.logits(shown.queries, shown.keys @ gate.keys)
    for head in range(HEADS):
        for step in range(0, STEPS, 8):
            blocks = list(choosable(FIRST + step))
            mass = {block: float(shown.mass[head, step, block]) for block in blocks}
            chosen = sorted(blocks, key=lambda block: -float(logits[head, step, block]))[:count]
            want[0] += sum(mass[block] for block in chosen)
            want[1] += sum(sorted(mass.values())[-count:])
    assert measured(gate, shown, EDGES, (budget,))[:, 0].tolist() == pytest.approx(want, rel=1e-4)


def test_the_caller_is_told_of_every_step() -> None:
    told: list[int] = []
    samples = [sample(1, random_gate(6, 0.4), 48)]
    train_gate(samples, EDGES, "a", rank=4, steps=5, queries=4, lr=1e-2, done=lambda: told.append(1))
    assert len(told) == 5


def test_training_finds_a_gate_that_is_there() -> None:
    """Rows that a hidden gate made: another document of it is predicted after training, and was not before."""
    hidden = random_gate(6, 0.4)
    samples = [sample(seed, hidden, 48) for seed in range(10, 30)]
    found, log = train_gate(samples, EDGES, "a", rank=4, steps=600, queries=24, lr=1e-2)
    assert len(log) == 3 and log[0] > log[1] > log[2]
    unseen, every = sample(40, hidden, 48), torch.arange(48)
    start, _ = train_gate(samples, EDGES, "a", rank=4, steps=1, queries=24, lr=1e-6)
    before, after = (float(gate_loss(gate, unseen, every, EDGES)) for gate in (start, found))
    assert after < 0.2 * before
    got, best = measured(found, unseen, EDGES, (0.4,))
    assert got > 0.9 * best


def test_what_comes_out_is_a_gate_for_the_captured_model(tmp_path: Path) -> None:
    result = train_seer(written(tmp_path / "traces"), tmp_path / "out", TINY, progress=False)
    made = Predictor.from_pretrained(tmp_path / "out")
    config = made.config
    assert (config.kind, config.block_size, config.layer_ids, config.heads) == ("seer-gate", P, [0, 2], HEADS)
    assert (config.base_model, config.fingerprint) == ("toy", "toy/2")
    assert (config.group, config.head_dim, config.rank) == (GROUP, DIM, 4)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(tmp_path / "out").items()}
    assert shapes == {"queries": (LAYERS, HEADS, GROUP * DIM, 4), "keys": (LAYERS, HEADS, 3 * DIM, 4)}
    assert result.parameters == sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    assert list(result.recovered) == ["0.4000", "0.6000"] and all(0 < x <= 1 for x in result.recovered.values())
    lines = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert lines[0]["recovered"] == result.recovered and lines[0]["config"]["rank"] == 4
    assert [line["layer"] for line in lines[1:]] == [0, 1] and all(len(line["loss"]) == 1 for line in lines[1:])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{result.recovered['0.6000']:.4f}" in card and f"{result.loss:.4f} nats" in card


def test_the_seed_decides_and_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    traces = written(tmp_path / "traces")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_seer(traces, tmp_path / name, dataclasses.replace(TINY, seed=seed), progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert same(tmp_path / "one", tmp_path / "two") and not same(tmp_path / "one", tmp_path / "three")


def test_nothing_is_learned_from_documents_held_out(tmp_path: Path) -> None:
    training, held_out = split(NAMES, TINY.validation, TINY.seed)
    results = [
        train_seer(written(tmp_path / f"traces {i}", other), tmp_path / str(i), TINY, progress=False)
        for i, other in enumerate(((), held_out, training))
    ]
    assert same(tmp_path / "0", tmp_path / "1") and not same(tmp_path / "0", tmp_path / "2")
    assert results[0].recovered != results[1].recovered and results[0].loss != results[1].loss


def test_traces_that_cannot_be_used_are_one_line(tmp_path: Path, persistent: Callable[..., Path]) -> None:
    def refused(traces: Path, message: str) -> None:
        with pytest.raises(TraceError, match=message) as caught:
            train_seer(traces, tmp_path / "out", TINY, progress=False)
        assert "\n" not in str(caught.value)

    refused(persistent(3), r"with queries nothing, expected \[2, 1, 40, 1\]: capture it again")
    refused(written(tmp_path / "one", names=NAMES[:1]), "got 1 usable documents, expected 2 or more")
    refused(written(tmp_path / "short", first=24), "got no document with queries after 24 tokens, expected longer ones")


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("rank", 0), ("queries", 0), ("sink_blocks", -1)])
def test_settings_are_checked(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"got {field}={value}, expected a whole number of at least"):
        SeerConfig(**{field: value})  # type: ignore[arg-type]


def test_rates_and_budgets_are_checked() -> None:
    with pytest.raises(ConfigError, match="got lr=0, expected a learning rate between 0 and 1"):
        SeerConfig(lr=0)
    with pytest.raises(ConfigError, match="expected shares above 0 and up to 1"):
        SeerConfig(budgets=(0.5, 1.5))
