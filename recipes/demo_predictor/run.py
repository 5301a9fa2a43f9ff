"""Train the predictor that ships with the demo LM: texts, capture, train, copy into the package.

Run `python -m recipes.demo_predictor.run --books FOLDER --work FOLDER`. Everything resumes. Texts come from the training
books alone (`recipes.demo_lm.corpus` names the held-out ones): one piece of each of `--texts` books, the first part with
facts planted in it, the last part with questions about them between its sentences, so that looking back is seen as well
as reading on. The predictor is the published network, trained as published (MSE on the next row).
"""

import argparse
import random
import shutil
from pathlib import Path

from tqdm import tqdm

from attnpred.capture import capture
from attnpred.evaluation.facts import make_facts
from attnpred.hf import DEMO_MODEL, load_model
from attnpred.predictor.training import TrainConfig, train_predictor
from recipes.demo_lm import corpus

LENGTH, ROWS, ASKING = 4096, 768, 700
TARGET = DEMO_MODEL.parent / "predictors" / "demo"


def write_texts(books: Path, folder: Path, tokenizer: object, count: int) -> None:
    """Write `count` texts of at least `LENGTH` tokens into `folder`."""
    if len(list(folder.glob("*.txt"))) >= count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    train, _ = corpus.read_books(books)
    for i, book in enumerate(tqdm(train[:: max(1, len(train) // count)][:count], desc="texts")):
        rng = random.Random(i)
        start = rng.randrange(max(1, len(book) - 8 * LENGTH))
        sentences = book[start : start + 8 * LENGTH].split(". ")
        sizes = [len(ids) + 2 for ids in tokenizer(sentences)["input_ids"]]
        facts = make_facts(rng, rng.choice((1, 2, 4, 6)))
        stated = {round(LENGTH * 0.8 * rng.random()): fact for fact in facts}
        asked = {LENGTH - ASKING + round((ASKING - 40) * rng.random()): rng.choice(facts) for _ in range(6)}
        text, seen = "", 0
        for sentence, size in zip(sentences, sizes, strict=True):
            text += sentence + "."
            seen += size
            for place in [place for place in stated if place <= seen]:
                text += stated.pop(place).statement
                seen += 15
            for place in [place for place in asked if place <= seen]:
                fact = asked.pop(place)
                text += fact.question + fact.answer + "."
                seen += 25
            text += " "
            if seen > LENGTH + 100:
                break
        (folder / f"book-{i:03d}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=80)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    model, tokenizer = load_model("demo")
    write_texts(args.books, args.work / "texts", tokenizer, args.texts)
    texts = sorted((args.work / "texts").glob("*.txt"))
    capture(
        model,
        tokenizer,
        texts,
        args.work / "traces",
        base_model="attnpred demo LM",
        tokens=LENGTH,
        rows=ROWS,
        per_file=1,
    )
    # Sinks and recent window as in the demo (`attnpred.evaluation.comparison.demo_settings`).
    result = train_predictor(
        args.work / "traces", args.work / "out", TrainConfig(steps=args.steps, sink_blocks=1, recent_blocks=2)
    )
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json", "README.md"):
        shutil.copyfile(args.work / "out" / name, TARGET / name)
    print(result)


if __name__ == "__main__":
    main()
