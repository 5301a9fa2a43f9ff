"""Train the gate of policy `seer` that ships with the package, on the traces that the other predictors are trained on.

Run `python -m recipes.predictors.seer --books FOLDER --work FOLDER`. What is already captured is kept: with the work folder
of `recipes.predictors.run` nothing is captured again, and both see the same documents (training books, tables, program text;
`recipes.demo_lm.corpus` names the books that nothing is trained on).
"""

import argparse
import shutil
from pathlib import Path

from attnpred.predictor.seer_training import LOG, SeerConfig, train_seer
from recipes.predictors.run import TARGET, write_traces

NAME = "seer-demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=91)
    parser.add_argument("--steps", type=int, default=SeerConfig().steps)
    args = parser.parse_args()
    traces = args.work / "traces"
    write_traces("demo", args.books, traces, args.texts)
    # Sinks and recent window are the defaults of `attnpred.config.CacheConfig`.
    print(train_seer(traces, args.work / NAME, SeerConfig(steps=args.steps, sink_blocks=1, recent_blocks=2)))
    (TARGET / NAME).mkdir(parents=True, exist_ok=True)
    for file in ("model.safetensors", "config.json", "README.md", LOG):
        shutil.copyfile(args.work / NAME / file, TARGET / NAME / file)


if __name__ == "__main__":
    main()
