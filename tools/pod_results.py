"""Measure sharing (PoD) alone and together with token selection on the demo LM: `docs/results/pod.json`.

python -m tools.pod_results --groups groups.json --text FILE [--weights NAME=FILE ...]        some minutes on one core

FILE of --text is a text that nothing was trained on; groups are those of `attnpred analyse-layers demo --delta 0.25`;
weights those of `python -m recipes.pod.adapt`, beside the shipped ones. Every policy has the same windows, 16 sinks and
`RECENT` tokens, which leave a budget of 256 room to choose; `pod` is measured with the window of the adaptation too.
Nothing is chosen by these figures.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from attnpred.config import CacheConfig
from attnpred.evaluation.session import PolicySession
from attnpred.evaluation.statistics import bootstrap
from attnpred.evaluation.tasks.base import Task, Wanted
from attnpred.evaluation.tasks.facts import Facts
from attnpred.evaluation.tasks.perplexity import Perplexity
from attnpred.files import write_text
from attnpred.hf import load_model, make_policy
from attnpred.predictor.layer_groups import LayerGroups

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "pod.json"
LENGTH, SINKS, RECENT, ADAPTED_RECENT = 2048, 16, 112, 240
BUDGETS = (LENGTH // 4, LENGTH // 8)
TASKS: dict[str, Task] = {"bits_per_byte": Perplexity(), "facts4": Facts(4)}
SHARE = "layer_groups=F"


def variants(groups: Path) -> list[tuple[str, str, CacheConfig]]:
    """Return label, policy and settings of each row; F stands for the file of groups."""
    plain = CacheConfig(budget=1.0, num_sink_tokens=SINKS, recent_window=RECENT)
    shared = replace(plain, layer_groups=str(groups), own_sinks=SINKS, own_recent=RECENT)
    found = [
        ("full", "full", plain),
        (f"pod:{SHARE}", "pod", shared),
        (f"pod:{SHARE},own_recent={ADAPTED_RECENT}", "pod", replace(shared, own_recent=ADAPTED_RECENT)),
    ]
    for budget in BUDGETS:
        for name in ("snapkv", "predicted"):
            found.append((name, name, replace(plain, budget=budget)))
            found.append((f"{name}:{SHARE}", name, replace(shared, budget=budget)))
    return found


def measure(
    model: Any, tokenizer: Any, name: str, settings: CacheConfig, examples: dict[str, list[Any]]
) -> dict[str, Any]:
    """Return the figures of one policy."""
    row: dict[str, Any] = {}
    for task, documents in examples.items():
        policy = make_policy(name, None, model.config, settings)
        with PolicySession(model, tokenizer, policy, settings) as session:
            [measured] = TASKS[task].measure(session, documents, None)
            costs = session.costs()
        values = torch.tensor([item.value for item in measured.items], dtype=torch.float64)
        row[task] = {"value": float(values.mean()), "interval": bootstrap(values), "n": len(values)}
        if task == "bits_per_byte":
            row |= {key: costs[key] for key in ("fast_bytes", "tokens_attended")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    weights = {name: path for name, _, path in (word.partition("=") for word in args.weights)}
    groups = LayerGroups.load(args.groups)
    wanted = Wanted(LENGTH, args.documents, args.seed, texts=(str(args.text),), steps=args.steps)
    result: dict[str, Any] = {
        "length": LENGTH, "documents": args.documents, "steps": args.steps, "seed": args.seed, "text": args.text.stem,
        "delta": groups.delta, "groups": groups.groups, "dropped": groups.dropped, "sinks": SINKS, "recent": RECENT,
        "rows": [],
    }  # fmt: skip
    for arm in ("shipped", *weights):
        model, tokenizer = load_model("demo", device="cpu")
        if arm != "shipped":
            model.load_state_dict(load_file(weights[arm]), strict=False)
            model.tie_weights()
        examples = {name: task.examples(tokenizer, wanted) for name, task in TASKS.items()}
        for label, policy, settings in variants(args.groups):
            row = {"weights": arm, "policy": label, "budget": settings.budget}
            row |= measure(model, tokenizer, policy, settings, examples)
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    rounded = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 5))
    write_text(args.out, json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
