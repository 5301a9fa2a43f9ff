"""`attnpred capture`: traces are the attention weights that the model's own eager attention reports, pooled naively.

Also for models with softcaps, attention sinks, sliding layers between, and layers that share another layer's keys.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnpred.capture import attention_trace, captured
from attnpred.cli.main import main
from attnpred.predictor.traces import TraceReader
from tests.hf.support import text_of, tokenizer
from tests.models import FAMILIES, prompt, tiny_model

LATE = {key: [1, 2] for key in ("qwen3_next", "qwen3_5_text", "bamba", "nemotron_h")} | {"jamba": [1]}
MIXED = {key: [0, 2] for key in ("gemma2", "gemma3_text", "gpt_oss", "cohere2")}
FULL_LAYERS = {"gemma4_text": [0, 3]} | MIXED | LATE


@torch.no_grad()
def naive_trace(model: PreTrainedModel, tokens: Tensor, layers: list[int], rows: int, block: int, heads: int) -> Tensor:
    """Return [layers, heads, rows, N], one maximum after the other, from the weights of eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        weights = model(tokens, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    if len(weights) < model.config.num_hidden_layers:  # linear layers have none
        weights = dict(zip(layers, weights, strict=True))
    length = tokens.shape[1]
    trace = torch.zeros(len(layers), heads, rows, -(-length // block))
    for i, layer in enumerate(layers):
        group = weights[layer].shape[1] // heads
        for head in range(heads):
            for row in range(rows):
                query = length - rows + row
                for token in range(query + 1):
                    seen = weights[layer][0, head * group : (head + 1) * group, query, token].max()
                    trace[i, head, row, token // block] = torch.maximum(trace[i, head, row, token // block], seen)
    return trace


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral-sliding"])
def test_a_trace_is_the_pooled_attention_of_the_last_queries(family: str) -> None:
    model, tokens = tiny_model(family), prompt(1, 45)
    heads = 4 if family in ("gpt_neox", "biogpt") else 2
    layers = FULL_LAYERS.get(family, [0, 1, 2])
    want = naive_trace(model, tokens, layers, 7, 4, heads)
    torch.testing.assert_close(attention_trace(model, tokens, 7, 4), want, rtol=1e-4, atol=1e-5)


def test_a_trace_of_every_query_is_causal() -> None:
    trace = attention_trace(tiny_model("llama"), prompt(1, 45), 45, 4)
    assert trace.shape == (3, 2, 45, 12) and bool((trace.amax((0, 1)) > 0).sum())
    for query in range(45):
        assert not trace[:, :, query, query // 4 + 1 :].any()
        assert bool((trace[:, :, query, : query // 4 + 1] > 0).all())


def rows_again(queries: Tensor, keys: Tensor, scale: float, block: int) -> Tensor:
    """Return [layers, Hkv, T, N]: block maxima of the softmax of scaled products, then the maximum over the group."""
    _, heads, rows, _ = queries.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    logits = scale * queries @ keys.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2)
    future = torch.arange(length) > torch.arange(length - rows, length)[:, None]
    weights = torch.softmax(logits.masked_fill(future, -torch.inf), -1)
    padded = torch.nn.functional.pad(weights, (0, -length % block)).unflatten(-1, (-1, block)).amax(-1)
    return padded.unflatten(1, (kv_heads, -1)).amax(2)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "olmo2", "gemma3_text"])
def test_queries_and_keys_are_those_that_the_rows_come_from(family: str) -> None:
    """Positions and norms are in them already, and the scale is the model's own."""
    model = tiny_model(family)
    found = captured(model, prompt(1, 45), 7, 4)
    heads = 4 if family == "gpt_neox" else 2
    layers = FULL_LAYERS.get(family, [0, 1, 2])
    assert found.layer_ids == tuple(layers) and found.scale == pytest.approx(8**-0.5)
    assert found.queries.shape == (len(layers), 4, 7, 8) and found.keys.shape == (len(layers), heads, 45, 8)
    torch.testing.assert_close(rows_again(found.queries, found.keys, found.scale, 4), found.rows, rtol=1e-4, atol=1e-5)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """The tiny llama and a tokenizer for it, as a local model."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def capture(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function: further arguments to exit code, stdout, stderr; it writes to `traces`, 50 tokens a document."""

    def command(*arguments: str, model: str = str(model_folder)) -> tuple[int, str, str]:
        sizes = ["--tokens", "50", "--rows", "9", "--block-size", "4", "--out", str(tmp_path / "traces")]
        code = main(["capture", model, *sizes, *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of 120 tokens."""
    path = tmp_path / "book.txt"
    path.write_text(text_of(prompt(1, 120)[0]), encoding="utf-8")
    return path


def test_the_command_writes_traces_that_equal_a_naive_recomputation(
    capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path
) -> None:
    code, out, _ = capture("--text", str(book), "--json")
    assert code == 0 and json.loads(out.splitlines()[-1]) == {"documents": 2, "out": str(tmp_path / "traces")}
    reader = TraceReader(tmp_path / "traces")
    assert (reader.meta.block_size, reader.meta.layers, reader.meta.heads, reader.meta.rows) == (4, 3, 2, 9)
    assert reader.meta.fingerprint == "llama-3-32-4-97" and reader.documents == ["book-0000", "book-0001"]
    for i, name in enumerate(reader.documents):
        tokens = prompt(1, 120)[:, 50 * i : 50 * (i + 1)]
        trace = reader.load(name)
        want = naive_trace(tiny_model("llama"), tokens, [0, 1, 2], 9, 4, 2)
        assert trace.first == 41 and trace.rows.dtype == torch.float16
        torch.testing.assert_close(trace.rows.float(), want, rtol=1e-3, atol=1e-4)


def test_the_command_writes_the_queries_and_keys_of_its_rows(
    capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path
) -> None:
    assert capture("--text", str(book))[0] == 0
    reader = TraceReader(tmp_path / "traces")
    meta = reader.meta
    assert (meta.query_heads, meta.head_dim, meta.layer_ids) == (4, 8, "0 1 2")
    for name in reader.documents:
        trace, found = reader.load(name), reader.vectors(name)
        assert found.first == trace.first == 41
        assert found.queries.shape == (3, 4, 9, 8) and found.keys.shape == (3, 2, 50, 8)
        again = rows_again(found.queries.float(), found.keys.float(), meta.scale, 4)
        torch.testing.assert_close(again, trace.rows.float(), rtol=2e-2, atol=5e-3)
        assert torch.equal(reader.vectors(name, 2).keys[0], found.keys[2])


def test_a_second_run_adds_what_is_missing_and_keeps_what_is_there(
    capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path
) -> None:
    assert capture("--text", str(book), "--per-file", "1")[0] == 0
    (first,) = (tmp_path / "traces").glob("doc-*")
    before = first.stat().st_mtime_ns
    assert capture("--text", str(book))[1] == f"{tmp_path / 'traces'}: 2 documents\n"
    assert len(TraceReader(tmp_path / "traces").documents) == 2 and first.stat().st_mtime_ns == before


def test_a_folder_of_texts_is_taken_in_order(
    capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("b.txt", "a.txt", "notes.md"):
        (texts / name).write_text(book.read_text(), encoding="utf-8")
    assert capture("--text", str(texts), "--text", str(book), "--per-file", "1")[0] == 0
    assert TraceReader(tmp_path / "traces").documents == ["a-0000", "b-0000", "book-0000"]


def test_the_demo_model_can_be_captured(capture: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The old mill stood by the river, and nobody knew why. " * 8, encoding="utf-8")
    assert capture("--text", str(text), model="demo")[0] == 0
    meta = TraceReader(tmp_path / "traces").meta
    assert (meta.base_model, meta.layers, meta.heads) == ("attnpred demo LM", 5, 2)


def assert_one_line(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    ours = [line for line in err.splitlines() if line.startswith("attnpred: ")]
    assert (code, out) == (2, "") and len(ours) == 1 and message in ours[0] and "Traceback" not in err


WRONG: dict[str, tuple[list[str], str]] = {
    "more rows than tokens": (["--rows", "51"], "got rows=51, expected 1 to tokens=50"),
    "no rows": (["--rows", "0"], "got rows=0, expected a whole number of at least 1"),
    "block size 0": (["--block-size", "0"], "got block_size=0, expected a whole number of at least 1"),
    "text too short": (["--tokens", "121"], "got no text of at least 121 tokens"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_option_is_one_line(mistake: str, capture: Callable[..., tuple[int, str, str]], book: Path) -> None:
    arguments, message = WRONG[mistake]
    assert_one_line(capture("--text", str(book), *arguments), message)


def test_a_missing_text_is_one_line(capture: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    path = tmp_path / "no-such-text"
    assert_one_line(capture("--text", str(path)), f"got {path}, expected a text file or a folder of .txt files")
    path.mkdir()
    assert_one_line(capture("--text", str(path)), f"got {path}, expected a text file or a folder of .txt files")


def test_an_unknown_model_is_one_line(capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path) -> None:
    name = str(tmp_path / "no-such-model")
    assert_one_line(capture("--text", str(book), model=name), f"got model '{name}'")


def test_a_file_where_the_folder_should_be_is_one_line(
    capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path
) -> None:
    (tmp_path / "traces").write_text("")
    assert_one_line(capture("--text", str(book)), "expected a folder")


def test_traces_of_other_sizes_there_are_one_line(capture: Callable[..., tuple[int, str, str]], book: Path) -> None:
    assert capture("--text", str(book))[0] == 0
    assert_one_line(
        capture("--text", str(book), "--block-size", "8"), "with block_size=4, expected 8: use another folder"
    )


def test_two_files_of_one_name_are_one_line(
    capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path
) -> None:
    """Their documents would have the same names, and half of them would be lost."""
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "book.txt"
    twin.write_text(book.read_text(), encoding="utf-8")
    assert_one_line(capture("--text", str(book), "--text", str(twin)), "got two files named 'book'")


def test_a_model_that_cannot_be_served_is_one_line(
    capture: Callable[..., tuple[int, str, str]], book: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "bloom"
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=4, vocab_size=97)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    assert_one_line(
        capture("--text", str(book), model=str(folder)), "got BloomForCausalLM, which does not let its attention"
    )
