"""Run `attnpred demo` for several policies and keep what it prints as JSON: `docs/results/demo.json`.

python -m tools.demo_results        some minutes on two cores
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

from attnpred.cli.main import main as attnpred

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "demo.json"
POLICIES = ("predicted", "mean_key", "quest", "ema", "accumulated", "last_step", "streaming", "oracle")


def run(arguments: list[str]) -> dict[str, object]:
    """Return the JSON object of one demo."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = attnpred(["demo", "--json", *arguments])
    if code:
        sys.exit(code)
    return dict(json.loads(out.getvalue().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("rest", nargs="*", help="options of `attnpred demo`, after --")
    args = parser.parse_args()
    # Rows of policies that are not asked for are kept.
    rows = {row["policy"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for policy in args.policies.split(","):
        # Averages of past rows need a true row now and then: every 32nd step (docs/results/calibration.jsonl).
        extra = ["--calibration-interval", "32"] if policy in ("ema", "last_step", "accumulated") else []
        rows[policy] = run(["--policy", policy, *extra, *args.rest])
        print(json.dumps(rows[policy]), flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
