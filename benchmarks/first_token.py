"""Seconds from an imported library to the first token of a sparse step: compiling, loading what was compiled, torch alone.

    python -m benchmarks.first_token [--child]

A process of its own imports everything, makes two layers of the 1B shape, and then has `generate` read 2,048 tokens and
give two: the second is the first that the sparse path makes. `cold` has an empty folder of compiled kernels, `warm` the
folder that `cold` filled, `torch` no numba. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

PROMPT = 2048


def child(hidden: bool) -> None:
    """Print the seconds that this process takes."""
    if hidden:
        sys.modules["numba"] = None  # type: ignore[assignment]  # as if it were not installed
    import torch

    import attnpred
    from benchmarks.models import random_model

    model = random_model(2)
    tokens = torch.randint(1, 1000, (1, PROMPT))
    began = time.perf_counter()
    with attnpred.attach(model, budget=512) as attached:
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, min_new_tokens=2, do_sample=False
        )
        spent = time.perf_counter() - began
        assert attached.stats()["total"]["sparse_steps"] == 2
    print(json.dumps(spent))


def compare() -> dict[str, float]:
    """Return the seconds of all three."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        places = os.environ | {"NUMBA_CACHE_DIR": folder, "XDG_CACHE_HOME": folder}
        for name in ("cold", "warm", "torch"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.first_token",
                "--child",
                *(["--hidden"] if name == "torch" else []),
            ]
            result = subprocess.run(command, env=places, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = round(float(result.stdout.splitlines()[-1]), 3)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", action="store_true", help="be the process that is measured")
    parser.add_argument("--hidden", action="store_true", help="without numba")
    args = parser.parse_args(arguments)
    if args.child:
        child(args.hidden)
    else:
        print(json.dumps({"first_token_s": compare()}))


if __name__ == "__main__":
    main()
