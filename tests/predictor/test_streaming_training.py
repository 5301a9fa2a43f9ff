"""Training a streaming predictor: what comes out fits the traces, the seed decides, held-out documents stay held out."""

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from attnpred.errors import ConfigError, TraceError
from attnpred.predictor.digest import DigestMap
from attnpred.predictor.pretrained import Predictor
from attnpred.predictor.replay import Step
from attnpred.predictor.streaming import FEATURES, PEAKS, Stream, StreamingNetwork
from attnpred.predictor.streaming_training import StreamingConfig, _merged, fit, train_streaming
from attnpred.predictor.traces import TraceMeta, TraceWriter, split
from attnpred.shapes import num_blocks

P, LAYERS, HEADS, GROUP, DIM, FIRST, STEPS = 4, 2, 2, 2, 8, 44, 16
META = TraceMeta("toy", "toy/2", P, LAYERS, HEADS, STEPS, "a test", HEADS * GROUP, DIM, "0 2", 0.5)
TINY = StreamingConfig(
    steps=2,
    rank=4,
    state_share=0.1,
    documents=9,
    rounds=1,
    sink_blocks=1,
    recent_blocks=1,
    budgets=(0.4, 0.6),
    history=4,
    validation=0.4,
)
NAMES = [f"document {number}" for number in range(5)]


def written(folder: Path, other: Collection[str] = (), steps: int = STEPS, names: Collection[str] = NAMES) -> Path:
    """Write documents of slowly turning queries; those named in `other` are different ones of the same name."""
    writer = TraceWriter(folder, META)
    for name in names:
        generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * (name in other))
        queries = torch.randn(LAYERS, HEADS * GROUP, steps, DIM, generator=generator).cumsum(2)
        keys = torch.randn(LAYERS, HEADS, FIRST + steps, DIM, generator=generator)
        rows = torch.zeros(LAYERS, HEADS, steps, num_blocks(FIRST + steps, P))
        writer.add(name, rows, FIRST, queries, keys)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_digest_keeps_no_more_directions_than_the_heads_have(tmp_path: Path) -> None:
    """The default of 32 is for heads of 64 and more; small models have 16."""
    wide = dataclasses.replace(TINY, rank=32)
    train_streaming(written(tmp_path / "traces"), tmp_path / "out", wide, progress=False)
    assert Predictor.from_pretrained(tmp_path / "out").config.rank == DIM


def test_what_comes_out_is_a_predictor_for_the_captured_model(tmp_path: Path) -> None:
    result = train_streaming(written(tmp_path / "traces"), tmp_path / "out", TINY, progress=False)
    predictor = Predictor.from_pretrained(tmp_path / "out")
    config, network = predictor.config, predictor.streaming
    assert (config.kind, config.block_size, config.history, config.layer_ids) == ("streaming", P, 4, [0, 2])
    assert (config.base_model, config.fingerprint, config.heads, config.rank) == ("toy", "toy/2", HEADS, 4)
    assert network.forecast.shape == network.correction.shape == (LAYERS, HEADS, FEATURES)
    start = StreamingNetwork()
    assert (network.forecast != start.forecast).all() and (network.correction != start.correction).all()
    assert [list(network.digest_map(place).vectors) for place in range(LAYERS)] == result.vectors
    assert result.parameters == sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    for shares in (result.forecast, result.correction):
        assert list(shares) == ["0.4000", "0.6000"] and all(0 < share <= 1 for share in shares.values())
    log = json.loads((tmp_path / "out" / "train_log.jsonl").read_text())
    assert log["forecast"] == result.forecast and log["config"]["rank"] == 4
    assert f"{result.correction['0.6000']:.4f}" in (tmp_path / "out" / "README.md").read_text()


def test_the_state_keeps_to_its_share(tmp_path: Path) -> None:
    """Digests and peaks of all heads together, in bytes per byte of keys and values in half precision."""
    result = train_streaming(written(tmp_path / "traces"), tmp_path / "out", TINY, progress=False)
    assert (
        len({count for counts in result.vectors for count in counts}) > 1
    )  # there is something to give, not enough for all
    network, held = Predictor.from_pretrained(tmp_path / "out").streaming, 0
    for place in range(LAYERS):
        stream = Stream(P, network.digest_map(place), 1)
        stream.seal(torch.randn(1, HEADS, 6 * P, DIM))
        stream.look(torch.randn(1, HEADS * GROUP, DIM), 1.0, HEADS)
        stream.push(torch.rand(1, HEADS, 1, 6))
        held += stream.bytes()
    assert held <= TINY.state_share * LAYERS * HEADS * 6 * P * DIM * 2 * 2
    assert held > LAYERS * HEADS * 6 * (4 * len(PEAKS) + TINY.rank // 2)


def test_a_head_has_the_projections_trained_for_its_vectors() -> None:
    counts = [1, 2, 4]
    maps = [DigestMap(torch.randn(3, 8, 4), torch.randn(3, 8, 4), torch.randn(3, 8), (n,) * 3) for n in counts]
    merged = _merged(maps, counts, [4, 1, 4])
    assert merged.vectors == (4, 1, 4)
    for head, source in enumerate((2, 0, 2)):
        for name in ("keys", "queries", "centre"):
            assert torch.equal(getattr(merged, name)[head], getattr(maps[source], name)[head])


def test_the_seed_decides_and_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    traces = written(tmp_path / "traces")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train_streaming(traces, tmp_path / name, dataclasses.replace(TINY, seed=seed), progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert same(tmp_path / "one", tmp_path / "two") and not same(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_is_learned_from_documents_held_out(tmp_path: Path, shared: bool) -> None:
    """Other held-out documents change the figures and no weight; another one to train on changes weights.

    With no bytes to give away: how many vectors a head gets is measured on held-out documents.
    """
    config = dataclasses.replace(TINY, shared=shared, state_share=0.01)
    training, held_out = split(NAMES, config.validation, config.seed)
    results = [
        train_streaming(written(tmp_path / f"traces {i}", other), tmp_path / str(i), config, progress=False)
        for i, other in enumerate(((), held_out, training[:1]))
    ]
    assert same(tmp_path / "0", tmp_path / "1") and not same(tmp_path / "0", tmp_path / "2")
    assert results[0].forecast != results[1].forecast


def test_shared_weights_are_one_set_and_need_no_projections(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, shared=True)
    result = train_streaming(written(tmp_path / "traces"), tmp_path / "out", config, progress=False)
    predictor = Predictor.from_pretrained(tmp_path / "out")
    assert set(weights(tmp_path / "out")) == {"forecast", "correction"} and result.vectors == []
    assert predictor.streaming.forecast.shape == predictor.streaming.correction.shape == (1, 1, FEATURES)
    assert predictor.config.layer_ids == [] and predictor.config.fingerprint == ""
    assert predictor.place(7) == 0 and predictor.streaming.digest_map(0) is None


def test_traces_that_cannot_be_used_are_one_line(tmp_path: Path, persistent: Callable[..., Path]) -> None:
    def refused(traces: Path, config: StreamingConfig, message: str) -> None:
        with pytest.raises(TraceError, match=message) as caught:
            train_streaming(traces, tmp_path / "out", config, progress=False)
        assert "\n" not in str(caught.value)

    for shared in (False, True):
        config = dataclasses.replace(TINY, shared=shared)
        refused(persistent(3), config, r"with queries nothing, expected \[2, 1, 40, 1\]: capture it again")
    refused(written(tmp_path / "one", names=NAMES[:1]), TINY, "got 1 usable documents, expected 2 or more")
    refused(written(tmp_path / "few", steps=4), TINY, "got no document with more than 4 rows after 24 tokens")
    long = dataclasses.replace(TINY, sink_blocks=6)
    refused(written(tmp_path / "short"), long, "got no document with more than 4 rows after 44 tokens")


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("rank", 1), ("rank", 5), ("documents", 0), ("rounds", 0), ("history", 0)]
)
def test_settings_are_checked(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"got {field}={value}"):
        StreamingConfig(**{field: value})  # type: ignore[arg-type]


def test_budgets_are_shares() -> None:
    with pytest.raises(ConfigError, match="expected shares above 0 and up to 1"):
        StreamingConfig(budgets=(0.5, 1.5))


def steps_to_learn_from(count: int = 30) -> list[Step]:
    """Two heads: the attention of one is feature 1, that of the other feature 2; the rest is noise."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        features = torch.randn(2, 2, 12, FEATURES, generator=generator)
        logits = torch.stack((features[0, 0, :, 1], features[0, 1, :, 2]))
        features[1] = features[0]
        found.append(Step(features, torch.softmax(2 * logits, -1)))
    return found


def loss(steps: list[Step], table: Tensor) -> float:
    parts = [-(s.mass * torch.log_softmax((s.features * table[:, None]).sum(-1), -1)).sum(-1).mean() for s in steps]
    return float(sum(parts) / len(parts))


def test_fitting_finds_the_feature_that_tells() -> None:
    """Each head its own; weights that all heads share find both."""
    steps = steps_to_learn_from()
    start = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(2, -1)
    found = fit(steps, start, seed=0, epochs=4, lr=5e-2)
    assert found.shape == (2, FEATURES) and torch.equal(start[0], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert found[0].argmax() == 1 and found[1].argmax() == 2 and (found.max(-1).values > 1).all()
    assert found.abs().sort(-1).values[:, :-1].max() < 0.5
    common = fit(steps, start[:1], seed=0, epochs=4, lr=5e-2)
    assert common.shape == (1, FEATURES) and set(common[0].topk(2).indices.tolist()) == {1, 2}
    assert loss(steps, found) < loss(steps, common) < loss(steps, start)
    assert torch.equal(found, fit(steps, start, seed=0, epochs=4, lr=5e-2))
    assert not torch.equal(found, fit(steps, start, seed=1, epochs=4, lr=5e-2))


def test_every_part_of_the_work_shows_that_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_streaming(written(tmp_path / "traces"), tmp_path / "out", TINY)
    said = capsys.readouterr().err
    for part in ("digests", "documents", "forecast 1 of", "correction 1 of"):
        assert f"{part}" in said and "100%|" in said.rpartition(part)[2]
