"""Run the grids behind docs/policies.md and docs/evidence.md: `python -m tools.evidence [NAME ...]`, or all of `RUNS`.

Each run is one `attnpred eval` on the demo model, whose rows go to docs/results/NAME.jsonl. What is there already is not run
again, so a run that was stopped goes on; delete the file to measure anew. `--devices cpu,cpu` runs two at once: quality
is the same, times are not: those of a step are `attnpred bench decode`, in which policies take turns (`TIMES`).
"""

import argparse
import sys
from pathlib import Path

from attnpred.cli.main import main as attnpred

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
EVICTION = "streaming h2o snapkv sepllm fastgen cascading subgen"
TOKENS = "h2o:block_size=1 snapkv:block_size=1 tactic:block_size=1 hip:block_size=2"
RETRIEVAL = "quest mean_key tactic hip seer"
REUSE = "last_step ema freekv recycled tidal"
OURS = "predicted predicted:late_share=0 predicted:predictor=attention-predictor-cnn,calibration_interval=5"
WRAPPED = "snapkv:head_budgets=adaptive"
EVERY = f"full oracle {EVICTION} {TOKENS} {RETRIEVAL} {REUSE} {OURS} {WRAPPED}"
BUDGETS = "0.25,0.125,0.076923,0.0625,0.03125"
COMMON = ["--lengths", "4096", "--seed", "5"]

RUNS: dict[str, list[str]] = {
    "policies": ["--policies", EVERY, "--budgets", BUDGETS, *COMMON, "--tasks", "facts4", "--recovery"],
    "turns": ["--policies", EVERY, "--budgets", BUDGETS, *COMMON, "--tasks", "facts_turns"],
    "further": [
        *("--policies", EVERY, "--budgets", BUDGETS, *COMMON, "--documents", "4"),
        *("--tasks", "perplexity,facts1,hops"),
    ],
    "prompted": [
        *(
            "--policies",
            f"full {EVICTION} h2o:block_size=1 snapkv:block_size=1 quest predicted",
            "--budgets",
            "0.125,0.076923",
            *COMMON,
        ),
        *("--tasks", "facts4_prompt", "--documents", "6"),
    ],
    "offloaded": [
        *("--policies", f"full oracle {EVICTION} {RETRIEVAL} {REUSE} {OURS}", "--budgets", BUDGETS),
        *(*COMMON, "--tasks", "perplexity", "--limit", "1", "--offload", "cpu"),
    ],
    "compression": [
        *("--policies", "full predicted", "--budgets", "0.25,0.125,0.0769,0.0625,0.05,0.04,0.03125", *COMMON),
        *("--tasks", "facts4,perplexity", "--documents", "20"),
    ],
    "needle": [
        *("--policies", "full predicted quest snapkv streaming", "--budgets", "0.015625", "--lengths", "4096,8192"),
        *("--num-sink-tokens", "16", "--recent-window", "16", "--tasks", "needle", "--seed", "5"),
    ],
    "chain": ["--policies", "full predicted quest ema snapkv", "--budgets", "0.13", *COMMON, "--tasks", "chain"],
}
"""What each run is given after the model."""


TIMES = [
    *("bench", "decode", "--shapes", "demo", "--dtypes", "float32", "--contexts", "4096", "--budget", "0.076923"),
    *("--rounds", "3", "--variants", "floor", "dense", "predicted", "--out", str(RESULTS / "policy_times.json")),
    *("--policies", ",".join(word for word in EVERY.split() if word not in ("full", "predicted") and ":" not in word)),
]
"""What is given to `attnpred` for the times of a step, at rest: the run named `times`."""


def main(arguments: list[str]) -> int:
    """Run what is named; return the largest exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}, times; left out: all")
    parser.add_argument("--devices", help="as for attnpred eval")
    chosen = parser.parse_args(arguments)
    names = chosen.names or [*RUNS, "times"]
    unknown = [name for name in names if name not in RUNS and name != "times"]
    if unknown:
        parser.error(f"got {unknown[0]!r}, expected one of {', '.join(RUNS)}, times")
    devices = ["--devices", chosen.devices] if chosen.devices else []
    worst = 0
    for name in names:
        given = (
            TIMES
            if name == "times"
            else ["eval", "demo", "--out", str(RESULTS / f"{name}.jsonl"), *RUNS[name], *devices]
        )
        worst = max(worst, attnpred(given))  # 1: some cells were left out, and told
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
