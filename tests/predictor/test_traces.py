"""Traces on disk: every bit comes back, nothing half-written is ever seen, and mistakes are named."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from attnpred.errors import TraceError
from attnpred.predictor import traces
from attnpred.predictor.traces import TraceMeta, TraceReader, TraceWriter, split
from attnpred.shapes import num_blocks

META = TraceMeta("toy", "toy/2/3", block_size=4, layers=2, heads=3, rows=6, created_by="a test")


def document(first: int = 9, steps: int = 6, meta: TraceMeta = META, seed: int = 0, spare: int = 0) -> torch.Tensor:
    """Random rows [layers, heads, steps, N], causal, some of the smallest float16 among them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = num_blocks(first + steps, meta.block_size) + spare
    rows = torch.rand(meta.layers, meta.heads, steps, blocks, generator=generator) ** 12
    for step in range(steps):
        rows[:, :, step, num_blocks(first + step + 1, meta.block_size) :] = 0
    return rows.half()


@settings(deadline=None, max_examples=20)
@given(
    name=st.text(min_size=1, max_size=90),
    block_size=st.integers(1, 20),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    first=st.integers(0, 100),
    spare=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_every_bit_comes_back(
    name: str, block_size: int, sizes: tuple[int, int, int], first: int, spare: int, seed: int
) -> None:
    meta = TraceMeta("m", "f", block_size, *sizes)
    rows = document(first, sizes[2], meta, seed, spare)
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter(folder, meta)
        assert not writer.has(name)
        writer.add(name, rows, first)
        assert writer.has(name)
        reader = TraceReader(folder)
        assert reader.meta == meta and reader.documents == [name]
        trace = reader.load(name)
        assert trace.first == first and torch.equal(trace.rows.view(torch.int16), rows.view(torch.int16))
        assert reader.size(name) == traces.TraceSize(sizes[2], rows.shape[3], first)
        for layer in range(meta.layers):
            assert torch.equal(reader.load(name, layer).rows, rows[layer])


@settings(deadline=None, max_examples=12)
@given(
    names=st.lists(
        st.sampled_from(["a b", "A b", "a-b", "a/b", "a_b", "ä", "ö", "x" * 70, "x" * 71, ".."]), unique=True
    )
)
def test_two_names_never_share_a_file(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter(folder, META)
        for seed, name in enumerate(names):
            assert not writer.has(name)
            writer.add(name, document(seed=seed), 9)
        files = {path.name.lower() for path in Path(folder).glob("doc-*")}
        assert len(files) == len(names) and TraceReader(folder).documents == sorted(names)
        for seed, name in enumerate(names):
            assert torch.equal(TraceReader(folder).load(name).rows, document(seed=seed))


def test_an_interrupted_capture_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TraceWriter(tmp_path, META)
    writer.add("one", document(), 9)

    def killed(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        writer.add("two", document(), 9)
    (tmp_path / ".doc-two.safetensors.1.0123abcd.tmp").write_bytes(b"what a power cut leaves")
    again = TraceWriter(tmp_path, META)
    assert again.has("one") and not again.has("two")
    assert TraceReader(tmp_path).documents == ["one"]
    again.add("two", document(seed=2), 9)
    assert TraceReader(tmp_path).documents == ["one", "two"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["doc-one.safetensors", "doc-two.safetensors", "traces.json"]


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    TraceWriter(tmp_path, META)
    other = TraceMeta("toy", "toy/2/3", block_size=8, layers=2, heads=3, rows=6)
    with pytest.raises(TraceError, match="with block_size=4, expected 8: use another folder"):
        TraceWriter(tmp_path, other)
    newer = TraceMeta("toy", "toy/2/3", block_size=4, layers=2, heads=3, rows=6, created_by="a newer version")
    assert TraceReader(TraceWriter(tmp_path, newer).folder).meta == META


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, META)
    for rows in (document()[:1], document()[:, :2], document()[0], document(steps=7)):
        with pytest.raises(TraceError, match=r"got rows of shape \(.*\) for 'x', expected \[2, 3, 1 to 6, blocks\]"):
            writer.add("x", rows, 9)
    with pytest.raises(
        TraceError, match="got 4 blocks for 6 queries from position 13, expected every block of 4 tokens"
    ):
        writer.add("x", document(), 13)
    with pytest.raises(TraceError, match="from position -1"):
        writer.add("x", document(), -1)
    with pytest.raises(TraceError, match="got an empty document name"):
        writer.add("", document(), 9)
    assert not writer.has("x")


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_only_probabilities_are_written(tmp_path: Path, value: float) -> None:
    rows = document()
    rows[1, 2, 3, 0] = value
    with pytest.raises(TraceError, match="expected probabilities"):
        TraceWriter(tmp_path, META).add("x", rows, 9)


def test_attention_to_the_future_is_refused(tmp_path: Path) -> None:
    rows = document(first=9)  # queries at 9..14, the blocks of the last begin at 12
    writer = TraceWriter(tmp_path, META)
    writer.add("x", rows, 9)
    rows[0, 0, 3, 3] = 0.5  # position 12 is the first in block 3
    writer.add("x", rows, 9)
    rows[0, 0, 2, 3] = 0.5  # position 11 has not seen it
    with pytest.raises(TraceError, match="attention after its query"):
        writer.add("x", rows, 9)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="got no folder"):
        TraceReader(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"got no traces\.json"):
        TraceReader(tmp_path)
    TraceWriter(tmp_path, META).add("x", document(), 9)
    reader = TraceReader(tmp_path)
    with pytest.raises(TraceError, match="got no document 'y'"):
        reader.load("y")
    for read in (reader.load, reader.vectors):
        with pytest.raises(TraceError, match="got layer 2, expected 0 to 1"):
            read("x", 2)
    file = tmp_path / "doc-x.safetensors"
    save_file({"rows": document()[:1]}, file, metadata={"name": "x", "first": "9"})
    with pytest.raises(TraceError, match=r"with rows \[1, 3, 6, 4\] and first='9', expected float16 \[2, 3, T, N\]"):
        reader.load("x")
    save_file({"rows": document()}, file, metadata={"name": "x"})
    with pytest.raises(TraceError, match="first=None"):
        reader.size("x")
    save_file({"other": document()}, file, metadata={"name": "x", "first": "9"})
    with pytest.raises(TraceError, match=r"with rows \[\]"):
        reader.load("x")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(TraceError, match="got a damaged"):
        TraceReader(tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"format": 1}, "got format=1, expected 2"),
        ({"layers": 0}, "got layers=0, expected a whole number"),
        ({"base_model": None}, "got base_model=None, expected a text"),
        ({"extra": 1}, "expected the keys"),
    ],
)
def test_a_wrong_traces_json_is_explained(tmp_path: Path, change: dict[str, object], part: str) -> None:
    TraceWriter(tmp_path, META)
    values = json.loads((tmp_path / "traces.json").read_text())
    (tmp_path / "traces.json").write_text(json.dumps(values | change))
    with pytest.raises(TraceError, match=part):
        TraceReader(tmp_path)
    (tmp_path / "traces.json").write_text("{")
    with pytest.raises(TraceError, match="not JSON"):
        TraceReader(tmp_path)


def test_a_folder_of_format_1_is_refused(tmp_path: Path) -> None:
    """As the version before wrote it: it has no queries, no keys and no scale."""
    old = {"base_model": "toy", "fingerprint": "toy/2/3", "block_size": 4, "layers": 2, "heads": 3, "rows": 6}
    (tmp_path / "traces.json").write_text(json.dumps(old | {"created_by": "attnpred capture", "format": 1}))
    for use in (lambda: TraceReader(tmp_path), lambda: TraceWriter(tmp_path, META)):
        with pytest.raises(TraceError, match=r"expected the keys .*: update attnpred, or capture again") as caught:
            use()
        assert "\n" not in str(caught.value)


FULL = TraceMeta("toy", "toy/2/3", 4, layers=2, heads=3, rows=6, query_heads=6, head_dim=5, layer_ids="1 4", scale=0.3)


def from_bits(*shape: int, seed: int) -> torch.Tensor:
    """Return float16 of any finite bits, also the smallest numbers and minus zero."""
    bits = torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    values = bits.view(torch.float16)
    return torch.where(values.isfinite(), values, torch.tensor(-0.0, dtype=torch.float16))


@pytest.mark.parametrize("steps", [1, 6])
def test_queries_and_keys_come_back_bit_by_bit(tmp_path: Path, steps: int) -> None:
    queries, keys = from_bits(2, 6, steps, 5, seed=1), from_bits(2, 3, 9 + steps, 5, seed=2)
    writer = TraceWriter(tmp_path, FULL)
    writer.add("x", document(steps=steps), 9, queries, keys)
    writer.add(
        "y", document(steps=steps), 9, queries.flip(0).float(), keys.flip(0).float()
    )  # rounded to half precision
    reader = TraceReader(tmp_path)
    assert reader.meta == FULL and torch.equal(reader.load("x").rows, document(steps=steps))
    for name, order in (("x", [0, 1]), ("y", [1, 0])):
        for layer in (None, 0, 1):
            found = reader.vectors(name, layer)
            wanted = order if layer is None else order[layer : layer + 1]
            assert found.first == 9
            for got, want in ((found.queries, queries), (found.keys, keys)):
                assert got.dtype == torch.float16
                assert torch.equal(got.view(torch.int16), want[wanted].contiguous().view(torch.int16))


def test_queries_and_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    queries, keys = torch.randn(2, 6, 6, 5), torch.randn(2, 3, 15, 5)
    writer = TraceWriter(tmp_path, FULL)
    for wrong in (queries[:1], queries[:, :3], queries[:, :, :5], queries[..., :4], queries * 1e5, queries * torch.nan):
        with pytest.raises(TraceError, match=r"got queries of 'x' of shape .*, expected finite \[2, 6, 6, 5\]"):
            writer.add("x", document(), 9, wrong, keys)
    for wrong in (keys[:1], keys[:, :2], keys[:, :, 1:], keys[..., :4], keys / 0):
        with pytest.raises(TraceError, match=r"got keys of 'x' of shape .*, expected finite \[2, 3, 15, 5\]"):
            writer.add("x", document(), 9, queries, wrong)
    assert list(tmp_path.iterdir()) == [tmp_path / "traces.json"]


def test_a_document_without_queries_and_keys_says_so(tmp_path: Path) -> None:
    """It still trains a predictor that looks at rows; one with others than `traces.json` promises is damaged."""
    writer = TraceWriter(tmp_path, FULL)
    writer.add("x", document(), 9)
    reader = TraceReader(tmp_path)
    assert torch.equal(reader.load("x").rows, document())
    with pytest.raises(TraceError, match=r"with queries nothing, expected \[2, 6, 6, 5\]: capture it again"):
        reader.vectors("x")
    tensors = {"rows": document(), "queries": torch.zeros(2, 6, 6, 5), "keys": torch.zeros(2, 3, 14, 5)}
    save_file(tensors, tmp_path / "doc-x.safetensors", metadata={"name": "x", "first": "9"})
    with pytest.raises(TraceError, match=r"with keys \[2, 3, 14, 5\], expected \[2, 3, 15, 5\]: capture it again"):
        reader.vectors("x", 1)


def test_a_document_keeps_its_side_when_others_come() -> None:
    few, many = [f"book {i}" for i in range(40)], [f"book {i}" for i in range(400)]
    training, held_out = split(few, 0.2, 0)
    assert sorted(training + held_out) == sorted(few) and training and held_out
    more_training, more_held_out = split(many, 0.2, 0)
    assert set(training) <= set(more_training) and set(held_out) <= set(more_held_out)
    assert 0.15 < len(more_held_out) / 400 < 0.25
    assert split(few[::-1], 0.2, 0) == (training, held_out)
    assert split(few, 0.2, 1) != (training, held_out)


@given(st.sets(st.text(max_size=5), min_size=2, max_size=6), st.floats(0.01, 0.99), st.integers(0, 99))
def test_neither_side_is_empty(names: set[str], validation: float, seed: int) -> None:
    training, held_out = split(list(names), validation, seed)
    assert training and held_out and set(training) | set(held_out) == names and not set(training) & set(held_out)


def test_split_needs_two_documents_and_a_share() -> None:
    with pytest.raises(TraceError, match="got 1 usable documents, expected 2 or more"):
        split(["a"], 0.2, 0)
    with pytest.raises(TraceError, match=r"got validation=1\.0"):
        split(["a", "b"], 1.0, 0)


def test_keys_without_queries_are_refused(tmp_path: Path) -> None:
    keys = torch.zeros(META.layers, META.heads, 15, 1)
    with pytest.raises(TraceError, match="got one of queries and keys of 'a', expected both or none"):
        TraceWriter(tmp_path, META).add("a", document(), 9, keys=keys)
