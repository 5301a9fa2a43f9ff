"""Run `attnpred eval --tasks recovery` on a real model for docs/predictor.md: `docs/results/recovery.jsonl`.

python -m tools.recovery_results --texts FILE [FILE ...]        an hour on two cores; goes on where it was stopped

FILES are texts that nothing was tuned on; planted facts in the embedded book, program text and number tables are added.
`predicted` gets the budget less the bytes of its digests (3/256 of keys and values in 16 bits, 2/256 with blocks of 16), and
every policy that estimates the rest less those of that, so that they read as many bytes as their rivals; what `quest` reads
of digests, a 16th, is not taken from it. No true rows unless a name says so.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from attnpred.cli.main import main as attnpred
from attnpred.evaluation.variants import parse_variant
from attnpred.policies import POLICIES, Predicted
from attnpred.predictor.directions import rank_for
from attnpred.row_check import CHECK

RESULTS = Path(__file__).parent.parent / "docs" / "results"
DIM = 64
"""Of a head of SmolLM2."""
REST = 1 / 1024
"""Bytes that a step reads to estimate the rest, as a share of all KV: of SmolLM2 at 4,096 tokens, 3 KB a layer."""
RIVALS = (
    "streaming",
    "last_step:calibration_interval=0",
    "ema:rate=0.05,calibration_interval=0",
    "ema:rate=0.2,calibration_interval=0",
    "ema:rate=0.2,calibration_interval=0,block_size=4",
    "ema:rate=0.2,calibration_interval=5",
    "accumulated:calibration_interval=0",
    "predicted:predictor=attention-predictor-cnn,calibration_interval=5",
    "freekv:calibration_interval=0",
    "mean_key",
    "quest",
    "oracle",
    "oracle:block_size=4",
)
OURS = ("predicted:late_share=0", "predicted", "predicted:block_size=8", "predicted:block_size=16")
WITHOUT_REST = ("predicted:estimate_rest=false", "predicted:late_share=0,estimate_rest=false")
WITH_REST = tuple(
    f"{policy}estimate_rest=true"
    for policy in ("ema:rate=0.2,calibration_interval=0,block_size=4,", "oracle:block_size=4,", "quest:")
)
"""What the estimate of the rest gives by itself."""
BUDGETS = (0.076923, 0.125, 0.03125)


def word(policy: str, budget: float) -> str:
    """Return a policy with the budget that leaves room for what it reads beside keys and values."""
    variant, beside = parse_variant(policy), 0.0
    if variant.name == "predicted":
        size = variant.settings.get("block_size", Predicted.granularity)
        beside += rank_for(DIM, size) / 2 / (size * 4 * DIM)  # codes of 4 bits; a key and a value of 2 bytes each
    if variant.settings.get("estimate_rest", POLICIES[variant.name].estimates_rest):
        beside += REST
    return f"{policy}{',' if ':' in policy else ':'}budget={budget - beside:.6f}"


def compact(row: dict[str, object]) -> str:
    """Return the row as a line, without figures per head and items: `documents` are theirs."""
    kept = {key: value for key, value in row.items() if not key.endswith("by_head")}
    row = {key: value for key, value in kept.items() if key not in ("items", CHECK)}  # of the row as it was
    named = re.sub(r'"[^"]*/([^"/]+)\.txt"', r'"\1"', json.dumps(row))  # a text by its name, wherever it lay
    rounded = json.loads(named, parse_float=lambda text: round(float(text), 5))
    return json.dumps(rounded) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--documents", default="1")
    parser.add_argument("--steps", default="64")
    parser.add_argument("--seed", default="7")
    parser.add_argument("--rows", type=Path, default=Path("recovery-rows.jsonl"), help="file of the rows in full")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    args = parser.parse_args()
    texts = ",".join(["facts", "code", "table", *args.texts])
    for budget in args.budgets:
        words = " ".join((*RIVALS, *(word(policy, budget) for policy in (*OURS, *WITHOUT_REST, *WITH_REST))))
        code = attnpred(
            ["eval", args.model, "--tasks", "recovery", "--out", str(args.rows), "--texts", texts, "--policies", words,
             "--budgets", str(budget), "--lengths", str(args.length), "--documents", args.documents, "--steps", args.steps,
             "--seed", args.seed]
        )  # fmt: skip
        if code:
            return code
        rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
        (RESULTS / "recovery.jsonl").write_text("".join(map(compact, rows)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
