"""Books to one flat array of tokens, and the tokenizer they are written in.

Input: a folder with `manifest.jsonl` (one JSON object per book with `file` and `title`) and the text files it names.
Output, in the work folder: `tokenizer.json` (byte-level BPE; a digit, with the space before it, is one token),
`train.npy` and `heldout.npy` (uint16 token ids; book after book, each ended by the end-of-text token), `heldout.jsonl`
(title and text).

Lines inside a paragraph are joined, because the hard wraps of the source carry no meaning. Twelve books are held out
by title; nothing of them is seen by the tokenizer, the language model or any predictor.
"""

import json
import re
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SAMPLE = 120_000
HELD_OUT_TITLES = (
    "A Tale of Two Cities",
    "Emma",
    "Jane Eyre: An Autobiography",
    "Kim",
    "Lord Jim",
    "Moby Dick; Or, The Whale",
    "Right Ho, Jeeves",
    "The Adventures of Sherlock Holmes",
    "The House of Mirth",
    "The Island of Doctor Moreau",
    "The Murder on the Links",
    "The Picture of Dorian Gray",
)
ASCII_FORMS = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "_": "", "\ufeff": ""}
)


def clean(text: str) -> str:
    """Join wrapped lines, keep paragraphs, use plain quotes, drop the first and last 2 % (title pages, notes)."""
    text = text.translate(ASCII_FORMS).replace("\r\n", "\n")
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    text = "\n\n".join(p for p in paragraphs if len(p) > 1)
    edge = len(text) // 50
    return text[edge : len(text) - edge]


def read_books(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the training texts and the held-out (title, text) pairs."""
    train, heldout = [], []
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = clean((folder / row["file"]).read_text(encoding="utf-8", errors="replace"))
        if row["title"] in HELD_OUT_TITLES:
            heldout.append((row["title"], text))
        else:
            train.append(text)
    if len(heldout) != len(HELD_OUT_TITLES):
        raise SystemExit(
            f"got {len(heldout)} held-out books in {folder}, expected {len(HELD_OUT_TITLES)}: check the manifest's titles"
        )
    return train, heldout


def train_tokenizer(texts: list[str], words: list[str]) -> Tokenizer:
    """Byte-level BPE on a sample of every book; `words` (of the planted facts) are fed often enough to become tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [t[len(t) // 3 : len(t) // 3 + TOKENIZER_SAMPLE] for t in texts]
    tokenizer.train_from_iterator([*sample, *([" " + " ".join(words)] * 3000)], trainer)
    return tokenizer


def prepare(folder: Path, work: Path, words: list[str]) -> None:
    """Write tokenizer and token arrays into `work` unless they are there."""
    if (work / "heldout.jsonl").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    train, heldout = read_books(folder)
    tokenizer = train_tokenizer(train, words)
    tokenizer.save(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    for name, texts in (("train", train), ("heldout", [text for _, text in heldout])):
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(texts):
            ids.extend(encoding.ids)
            ids.append(end)
        np.save(work / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
    with (work / "heldout.jsonl").open("w") as file:
        for title, text in heldout:
            file.write(json.dumps({"title": title, "text": text}) + "\n")
