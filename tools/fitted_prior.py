"""Print the prior of `attnpred.predictor.fitted`: the weights that heads of several models find, in the median.

python -m tools.fitted_prior [MODEL ...]        a minute for each model on two cores

Each model reads a part of the embedded book and program text; the weights are those of every kv head of every layer,
drawn towards nothing. A model's own row stands beside the median over the other models, which is a prior made without it.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import torch

import attnpred
from attnpred.config import CacheConfig
from attnpred.evaluation.book import demo_book
from attnpred.evaluation.texts import program_text
from attnpred.hf import load_model

TOKENS = 2048


@torch.no_grad()
def weights_of(model: Any, tokenizer: Any, correcting: bool) -> list[list[float]]:
    """Return the weights [heads of all layers and texts, 4]."""
    found = []
    for text in (demo_book(), program_text()):
        ids = torch.tensor([tokenizer(text[: 12 * TOKENS], verbose=False)["input_ids"][:TOKENS]])
        with attnpred.attach(model, policy="predicted", config=CacheConfig(budget=0.125)) as attached:
            cache = attached.new_cache()
            model(ids, cache=cache, use_cache=True, logits_to_keep=1)
            nothing = torch.zeros(4)
            found += [decoder.memory.ridges[correcting].solve(nothing)[0] for decoder in cache.decoders.values()]
    return list(torch.cat(found).tolist())


def median(rows: list[list[float]]) -> list[float]:
    """Return the median of each weight."""
    return [round(statistics.median(column), 2) for column in zip(*rows, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo", "smollm2"])
    args = parser.parse_args()
    loaded = {name: load_model(name) for name in args.models}
    for correcting in (True, False):
        rows = {name: weights_of(*pair, correcting) for name, pair in loaded.items()}
        for name in rows:
            others = [median(rows[other]) for other in rows if other != name]
            print(
                f"{'correction' if correcting else 'forecast'}, {name}: {median(rows[name])}; others {median(others) if others else '-'}"
            )
        print(json.dumps({"correcting": correcting, "prior": median([median(own) for own in rows.values()])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
