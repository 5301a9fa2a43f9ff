"""Cut the text that `attnpred demo` lets a real model read: `attnpred/assets/island.txt`, and a card beside it.

    python -m recipes.demo_text --books FOLDER        FOLDER as `recipes.demo_lm.corpus` describes

The book is one of the twelve that nothing was trained on, and no evaluation of this repository uses it.
"""

import argparse
import json
from pathlib import Path

from recipes.demo_lm.corpus import HELD_OUT_TITLES, clean

ASSETS = Path(__file__).parents[1] / "attnpred" / "assets"
TITLE, BEGINNING, CHARACTERS = "The Island of Doctor Moreau", "THE cabin in which", 27_200
CARD = """# The text of `attnpred demo`

`island.txt`: the second chapter and what follows of *{title}* by H. G. Wells (1896; the author died in 1946), which is in the public domain, from
the text of Project Gutenberg. Paragraphs are one line each, quotation marks and dashes are plain; {characters:,} characters,
cut at the end of a paragraph. Nothing was trained or tuned on the book. Facts are planted in it when the demo runs
(`attnpred/evaluation/quiz.py`); made by `python -m recipes.demo_text`.
"""


def cut(text: str) -> str:
    """Return whole paragraphs of `text`, from `BEGINNING` on, of at most `CHARACTERS` characters."""
    start = text.index(BEGINNING)
    return text[start : text.rindex("\n\n", start, start + CHARACTERS)] + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True)
    folder: Path = parser.parse_args().books
    assert TITLE in HELD_OUT_TITLES
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    file = next(row["file"] for row in rows if row["title"] == TITLE)
    text = cut(clean((folder / file).read_text(encoding="utf-8")))
    (ASSETS / "island.txt").write_text(text, encoding="utf-8")
    (ASSETS / "island.md").write_text(CARD.format(title=TITLE, characters=len(text)), encoding="utf-8")


if __name__ == "__main__":
    main()
