"""Run `attnpred demo` with more policies and keep what it prints as JSON: `docs/results/demo.json`.

python -m tools.demo_results        some minutes on two cores at rest; fetches SmolLM2 where it is not here
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

from attnpred.cli.main import main as attnpred

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "demo.json"
POLICIES = "predicted,ema,last_step,quest,mean_key,streaming,oracle"


class _Both(io.StringIO):
    """Keeps what is printed, and shows it on stderr as it comes."""

    def write(self, text: str) -> int:
        sys.stderr.write(text)
        return super().write(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("rest", nargs="*", help="options of `attnpred demo`, after --")
    args = parser.parse_args()
    out = _Both()
    with contextlib.redirect_stdout(out):
        code = attnpred(["demo", "--json", "--policies", args.policies, *args.rest])
    if code:
        sys.exit(code)
    result = json.loads(out.getvalue().splitlines()[-1])
    if result["model"] != "smollm2":
        sys.exit(f"got figures of {result['model']}, expected smollm2: {RESULTS.name} was not written")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
