"""Train a second tiny language model, of another shape and seed, to ask whether a predictor serves a model it never saw.

    OMP_NUM_THREADS=1 python -m recipes.second_lm.run --books FOLDER --work FOLDER [--data FOLDER]

It is the recipe of the demo LM (`recipes.demo_lm`) with other sizes and about an eighth of the tokens; the model is
written to `work/model` for `attnpred.hf.load_model`, with a card of what it reads and finds. `--data` names the work
folder of a demo LM and spares the preparation of the books. The tokenizer has to be the demo's, so that the same texts
are the same tokens to both models; another one is refused. Not shipped: it only exists for the comparison.

What differs from the demo LM: layers (4, not 5), query heads to a kv head (3, not 2), head dim (48, not 64, and not
hidden size / heads), the seed, and how far it was trained. What does not: the family, the books, the kinds of sequence,
and the circuit laid in at the start (`recipes.demo_lm.model`), without which so short a training would not retrieve. A
predictor that serves both has shown that it does not need its own model, not that it serves models of other origin.
"""

import argparse
import json
import os
from pathlib import Path

from attnpred.hf import DEMO_MODEL
from recipes.demo_lm import export, train

SHAPE = ["--layers=4", "--heads=6", "--kv-heads=2", "--head-dim=48", "--hidden=192", "--ffn=576"]
SEED, LENGTHS = 1, ("1024", "2048", "4096")
# (scale, stop after so many tokens): the first training was planned at 0.2 and had to end sooner, so it goes on from
# where it stood on a schedule of 0.13, which leaves the long sequences and the fall of the learning rate.
PHASES = (("0.2", "1978368"), ("0.13", "99000000"))
PREPARED = ("tokenizer.json", "train.npy", "heldout.npy", "heldout.jsonl")


def take_data(source: Path, work: Path) -> None:
    """Link the prepared books of another run into `work`, in the order in which `corpus.prepare` writes them."""
    work.mkdir(parents=True, exist_ok=True)
    for name in PREPARED:
        if not (work / name).exists():
            os.link(source / name, work / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="as `recipes.demo_lm.corpus` describes it")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="work folder of a demo LM, whose prepared data is used")
    parser.add_argument(
        "--asked", type=int, default=40, help="questions per cell of the card at 4,096 tokens; 0: no card"
    )
    args = parser.parse_args()
    if args.data:
        take_data(args.data, args.work)
    places = ["--work", str(args.work)]
    for scale, stop in PHASES:
        schedule = ["--scale", scale, "--stop-after", stop]
        train.main([*places, "--books", str(args.books), "--seed", str(SEED), *schedule, *SHAPE])
    ours, demos = (json.loads((folder / "tokenizer.json").read_text()) for folder in (args.work, DEMO_MODEL))
    if ours["model"] != demos["model"]:
        raise SystemExit(f"got another tokenizer in {args.work} than in {DEMO_MODEL}: train from the demo LM's books")
    card = ["--name", "second LM", "--asked", str(args.asked), "--lengths", *LENGTHS]
    export.main([*places, "--to", str(args.work / "model"), *card, *SHAPE])


if __name__ == "__main__":
    main()
