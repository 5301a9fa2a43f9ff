"""Write the trained demo LM into the package: weights in bf16, config, tokenizer, the embedded book, and a model card.

Run `python -m recipes.demo_lm.export --work FOLDER` after `train.py`. Every figure of the card is measured here, on the
held-out books, with the exported files through stock transformers (full cache). With `--to` another model than the
demo's is written, to that folder and without touching the package; its sizes are given as they were to `train.py`.
"""

import argparse
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from attnpred.evaluation import facts_task
from attnpred.hf import DEMO_MODEL, load_model
from recipes.demo_lm import corpus, model

BOOK_TITLE, BOOK_BYTES = "The Adventures of Sherlock Holmes", 200_000
ASSETS = DEMO_MODEL.parent


def export(work: Path, target: Path, shape: model.Shape) -> None:
    """Write model and tokenizer to `target`; stop if the library's logits differ from those trained."""
    own_head_dim = {} if shape.head_dim * shape.heads == shape.hidden else {"head_dim": shape.head_dim}
    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        **own_head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    state = load_file(work / "checkpoint.safetensors")
    params = {name: state[name] for name in model.init(shape)}
    save_file(
        {k: v.bfloat16().contiguous() for k, v in params.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    (target / "model.safetensors").chmod(0o644)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(work / "tokenizer.json")),
        eos_token=corpus.END_OF_TEXT,
        pad_token=corpus.END_OF_TEXT,
        model_max_length=shape.max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(target)
    lm = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    AutoTokenizer.from_pretrained(target)
    tokens = torch.randint(1, shape.vocab, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rounded = {k: v.bfloat16().float() for k, v in params.items()}
        ours = model.logits(rounded, shape, tokens, torch.arange(200)[None].float()).float()
        theirs = lm(tokens).logits
    error = float((ours - theirs).norm() / theirs.norm())
    if error > 0.03:
        raise SystemExit(f"got logits that differ by {error:.3f} from the trained model, expected bf16 rounding only")


def write_book(work: Path) -> None:
    """Embed the middle of one held-out book, cut at paragraphs."""
    books = {row["title"]: row["text"] for row in map(json.loads, (work / "heldout.jsonl").read_text().splitlines())}
    text = books[BOOK_TITLE]
    start = text.index("\n\n", len(text) // 4) + 2
    end = text.rindex("\n\n", start, start + BOOK_BYTES)
    (ASSETS / "book.txt").write_text(text[start:end] + "\n", encoding="utf-8")


def perplexity(
    lm: torch.nn.Module, tokenizer: object, books: list[str], length: int, count: int
) -> tuple[float, float]:
    """Return (bits per byte, nats per token) over `count` pieces of `length` tokens of every book."""
    nats, tokens_seen, size = 0.0, 0, 0
    for text in books:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        for i in range(count):
            piece = ids[(i + 1) * len(ids) // (count + 1) :][: length + 1]
            with torch.no_grad():
                logits = lm(piece[None, :-1]).logits[0].float()
            nats += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
            tokens_seen += length
            size += len(tokenizer.decode(piece[1:]).encode())
    return nats / math.log(2) / size, nats / tokens_seen


def retrieval(lm: torch.nn.Module, tokenizer: object, books: list[str], length: int, keys: int, asked: int) -> int:
    """Return how many of `asked` documents with `keys` facts give the right answer to one question."""
    right = 0
    for i in range(asked):
        text = books[i % len(books)]
        start = random.Random(i).randrange(len(text) // 2)
        ids = torch.tensor(tokenizer(text[start : start + length * 6], verbose=False)["input_ids"])
        document = facts_task.plant(tokenizer, ids, length, keys, seed=10_000 + i)
        right += facts_task.answer(lm, tokenizer, document, document.facts[i % keys]) == document.facts[i % keys].answer
    return right


def card(work: Path, asked: int, target: Path, shape: model.Shape, name: str, lengths: list[int]) -> str:
    """Measure and return the model card."""
    demo = target == DEMO_MODEL
    lm, tokenizer = load_model("demo") if demo else load_model(str(target), dtype=torch.float32)
    books = [row["text"] for row in map(json.loads, (work / "heldout.jsonl").read_text().splitlines())]
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    last = log[-1]
    train_tokens = np.load(work / "train.npy", mmap_mode="r").size
    parameters = sum(p.numel() for p in lm.parameters())
    scores = []
    for length in lengths:
        n = asked if length == 4096 else asked // 4
        for keys in (1, 4):
            scores.append((length, keys, retrieval(lm, tokenizer, books, length, keys, n), n))
    text_scores = [(length, *perplexity(lm, tokenizer, books, length, 2)) for length in lengths]
    chance = math.log2(shape.vocab)
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "tags: [attnpred, demo]",
        "---",
        "",
        f"# attnpred {name}",
        "",
        f"A Qwen2-shaped language model of {parameters / 1e6:.2f} M parameters ({shape.layers} layers, "
        f"{shape.heads} query and {shape.kv_heads} kv heads), made to try attnpred without a download. "
        "It reads English books and finds facts planted in them; it knows next to nothing and should be used for nothing else.",
        "Written by `recipes/demo_lm/export.py`; every figure below was measured by it.",
        "",
        "## Data",
        "",
        f"{train_tokens:,} tokens of public-domain books, of which {last['tokens']:,} tokens of sequences were drawn (book text, "
        "facts planted in book text, repeated passages; the mixture and its schedule are in `recipes/demo_lm/train.py`), "
        "own tokenizer of 4,096 tokens. Held out, and used for all figures here:",
        "",
        *[f"* {title}" for title in corpus.HELD_OUT_TITLES],
        "",
        *([f"The embedded book of the demo is part of *{BOOK_TITLE}*.", ""] if demo else []),
        "## Losses at the end of training (nats per token, training mixture)",
        "",
        f"text {last['text']:.3f}, answers {last['answer']:.4f}, repeated passages {last['copy']:.3f}; sequences of {last['length']} tokens",
        "",
        "## Text, held-out books",
        "",
        "| length | bits per byte | nats per token |",
        "|---|---|---|",
        *[f"| {length} | {bpb:.3f} | {nats:.3f} |" for length, bpb, nats in text_scores],
        "",
        f"A uniform guess over the vocabulary would be {chance * text_scores[1][1] / (text_scores[1][2] / math.log(2)):.3f} bits per byte.",
        "",
        "## Retrieval, held-out books: every digit of the answer right, greedy, full cache",
        "",
        "| length | facts in the text | right | asked |",
        "|---|---|---|---|",
        *[f"| {length} | {keys} | {right} | {n} |" for length, keys, right, n in scores],
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--to", type=Path, default=DEMO_MODEL)
    parser.add_argument("--name", default="demo LM", help="what the card calls the model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8000], help="of the card's tables")
    model.add_shape_options(parser)
    args = parser.parse_args(argv)
    shape = model.shape_of(args)
    export(args.work, args.to, shape)
    if args.to == DEMO_MODEL:
        write_book(args.work)
        shutil.copyfile(args.work / "log.jsonl", Path(__file__).with_name("training_log.jsonl"))
    if args.asked:
        text = card(args.work, args.asked, args.to, shape, args.name, args.lengths)
        (args.to / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
