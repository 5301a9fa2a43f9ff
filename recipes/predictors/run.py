"""Train the predictors that ship with the package: texts, capture, train, copy into the package.

Run `python -m recipes.predictors.run --books FOLDER --work FOLDER`. What is already captured is kept.

attention-predictor-cnn: the published network, trained as published (MSE on the next row).
"""

import argparse
import shutil
from pathlib import Path

from tqdm import tqdm

from attnpred.capture import captured, trace_meta
from attnpred.hf import DEMO_MODEL, load_model
from attnpred.predictor.traces import TraceWriter
from attnpred.predictor.training import TrainConfig, train_predictor
from recipes.demo_lm import corpus
from recipes.predictors.texts import training_documents

ROWS, BLOCK = 640, 16
TARGET = DEMO_MODEL.parent / "predictors"


def write_traces(model_name: str, books: Path, folder: Path, count: int) -> None:
    """Capture `count` documents of the model into `folder`."""
    model, tokenizer = load_model(model_name)
    train, _ = corpus.read_books(books)
    writer = None
    for name, ids in tqdm(training_documents(tokenizer, train, count), "capture", count):
        if writer is not None and writer.has(name):
            continue
        rows = ROWS if ids.shape[1] > 2048 else ROWS - 128
        found = captured(model, ids, rows, BLOCK)
        if writer is None:
            base_model = "attnpred demo LM" if model_name == "demo" else Path(model_name).name
            meta = trace_meta(model, found, base_model, ROWS, BLOCK)
            writer = TraceWriter(folder, meta)
        if not writer.has(name):
            writer.add(name, found.rows, ids.shape[1] - rows, found.queries, found.keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=84)
    args = parser.parse_args()
    traces = args.work / "traces"
    write_traces("demo", args.books, traces, args.texts)
    # Sinks and recent window are the defaults of `attnpred.config.CacheConfig`.
    edges = {"sink_blocks": 1, "recent_blocks": 2}
    made = args.work / "attention-predictor-cnn"
    print(train_predictor(traces, made, TrainConfig(**edges)))
    (TARGET / made.name).mkdir(parents=True, exist_ok=True)
    for file in ("model.safetensors", "config.json", "README.md"):
        shutil.copyfile(made / file, TARGET / made.name / file)


if __name__ == "__main__":
    main()
