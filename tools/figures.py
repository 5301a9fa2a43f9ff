"""Draw the figure of docs/predictor.md: `docs/figures/patterns.png`.

python -m tools.figures        under a minute; needs the extra `plot`

It shows heads of the demo LM as it reads the embedded book and a number table, in 256 colours to stay small.
"""

import argparse
import random
import sys
from pathlib import Path

from attnpred.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
LENGTH, STEPS = 4096, 256
TABLE_SEED = 3  # a table with lines of nearly equal length


def patterns(path: Path) -> None:
    """Draw the heads of the demo LM that show the patterns most, and print what they score."""
    from attnpred.capture import attention_trace
    from attnpred.evaluation.book import demo_book
    from attnpred.evaluation.texts import number_table
    from attnpred.hf import load_model
    from tools.patterns_figure import draw, pattern_scores, strongest

    model, tokenizer = load_model("demo")
    texts = {"the book": demo_book(), "a number table": number_table(random.Random(TABLE_SEED), 2 * LENGTH)}
    traces = {}
    for name, text in texts.items():
        tokens = tokenizer(text, verbose=False, return_tensors="pt")["input_ids"][:, :LENGTH]
        traces[name] = attention_trace(model, tokens, STEPS)
        for pattern, scores in pattern_scores(traces[name]).items():
            print(f"{name}, {pattern}: " + "  ".join(f"{float(score):.2f}" for score in scores.flatten()))
    draw(strongest(traces), path)


def shrink(path: Path) -> None:
    """Write a PNG again with 256 colours, a third of its size."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main(arguments: list[str]) -> int:
    """Draw the figure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder to write to")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        patterns(args.out / "patterns.png")
    except MissingExtraError as error:
        print(error, file=sys.stderr)
        return 2
    path = args.out / "patterns.png"
    shrink(path)
    print(f"{path}: {path.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
