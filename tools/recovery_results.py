"""Run `attnpred eval --tasks recovery` for the tables of docs/predictor.md: `docs/results/recovery.jsonl`.

python -m tools.recovery_results --texts FILE [FILE ...]        half an hour on two cores

FILES are texts that nothing was trained on; planted facts in the embedded book, program text and number tables are
added. Main rows: every policy, budget and length. Further rows: settings of single policies at 1/13 and 4,096 tokens.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from attnpred.cli.main import main as attnpred
from attnpred.row_check import CHECK

RESULTS = Path(__file__).parent.parent / "docs" / "results"
RIVALS = (
    "streaming",
    "last_step:calibration_interval=5",
    "ema:rate=0.02,calibration_interval=5",
    "ema:rate=0.1,calibration_interval=5",
    "ema:rate=0.3,calibration_interval=5",
    "accumulated:calibration_interval=5",
    "predicted:predictor=attention-predictor-cnn,calibration_interval=5",
    "mean_key_last",
    "mean_key",
    "quest",
)
OURS = ("predicted:late_share=0", "predicted:late_share=0.06", "predicted", "oracle")
SETTINGS = (
    *(f"predicted:late_share={late}" for late in (0.1, 0.2, 0.3)),
    *(f"predicted:late_share=0,calibration_interval={every}" for every in (5, 16)),
    *(f"predicted:calibration_interval={every}" for every in (5, 16)),
    *(f"predicted:hysteresis={bonus}" for bonus in (0.25, 0.5, 1, 2)),
    "predicted:predictor=general",
    "predicted:predictor=general,late_share=0",
    "predicted:per_query_head=true",
    *(f"ema:rate=0.1,calibration_interval={every}" for every in (0, 16)),
)
BUDGETS = "0.25,0.125,0.076923,0.0625,0.03125"


def run(out: Path, texts: list[str], *arguments: str) -> list[dict[str, object]]:
    """Return the rows of one `attnpred eval`."""
    out.unlink(missing_ok=True)  # it would go on with the rows that are there
    code = attnpred(["eval", "demo", "--tasks", "recovery", "--out", str(out), "--texts", ",".join(texts), *arguments])
    if code:
        sys.exit(code)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def compact(row: dict[str, object], keep_heads: bool) -> str:
    """Return the row as a line; figures per head only where a table needs them, and no items: `documents` are theirs."""
    kept = {key: value for key, value in row.items() if not key.endswith("by_head") or keep_heads}
    row = {key: value for key, value in kept.items() if key not in ("items", CHECK)}  # of the row as it was
    rounded = json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 5))
    return json.dumps(rounded) + "\n"


def second_model(folder: Path, predictor: Path, out: Path, texts: list[str], common: list[str]) -> list[str]:
    """Return the rows of another model: its own predictor against the general one that the demo model's traces trained."""
    policies = ["ema:rate=0.1", "ema:rate=0.3", "mean_key_last", "mean_key", "quest", "oracle"]
    for name in ("general", str(predictor)):
        policies += [f"predicted:predictor={name},late_share=0", f"predicted:predictor={name}"]
    arguments = ["--policies", " ".join(policies), "--budgets", "0.076923", "--texts", ",".join(texts), *common]
    out.unlink(missing_ok=True)
    if code := attnpred(["eval", str(folder), "--tasks", "recovery", "--out", str(out), *arguments]):
        sys.exit(code)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    for row in rows:  # names that mean something elsewhere
        row["model"] = "second"
        row["policy"] = row["policy"].replace(str(predictor), "own")
    return [compact(row, False) for row in rows if row["text"] == "all"]


def facts() -> dict[str, object]:
    """Return what the demo finds with a hundred questions at 4,096 tokens."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        size = ["--context", "4096", "--documents", "25", "--steps", "512", "--seed", "11"]
        code = attnpred(["demo", "--model", "demo", "--json", *size])
    if code:
        sys.exit(code)
    return dict(json.loads(said.getvalue().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--lengths", default="1024,4096,8192")
    parser.add_argument("--documents", default="2")
    parser.add_argument("--steps", default="96")
    parser.add_argument("--seed", default="7")
    parser.add_argument("--second", type=Path, nargs=2, metavar=("MODEL", "PREDICTOR"))
    parser.add_argument("--only", choices=("main", "settings", "facts", "second"))
    args = parser.parse_args()
    texts = ["facts", "code", "table", *args.texts]
    common = ["--documents", args.documents, "--steps", args.steps, "--seed", args.seed]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        if args.only in (None, "main"):
            rows = run(out, texts, "--policies", " ".join((*RIVALS, *OURS)), "--budgets", BUDGETS,
                       "--lengths", args.lengths, *common)  # fmt: skip
            lines = [compact(row, row["text"] == "all" and row["policy"] == "predicted") for row in rows]
            (RESULTS / "recovery.jsonl").write_text("".join(lines), encoding="utf-8")
        if args.only in (None, "settings"):
            rows = run(out, texts, "--policies", " ".join(SETTINGS), "--budgets", "0.076923", *common)
            lines = [compact(row, False) for row in rows if row["text"] == "all"]
            rows = run(out, texts, "--policies", "predicted", "--budgets", BUDGETS, *common)
            heads = [compact(row, True) for row in rows if row["text"] == "all"]
            (RESULTS / "recovery_heads.jsonl").write_text("".join(heads), encoding="utf-8")
            for size in ("8", "16", "32", "64"):
                policies = "ema:rate=0.1,calibration_interval=5 mean_key quest oracle"
                more = run(out, texts, "--policies", policies, "--budgets", "0.076923", "--block-size", size,
                           "--num-sink-tokens", "64", "--recent-window", "64", *common)  # fmt: skip
                lines += [compact(row, False) for row in more if row["text"] == "all"]
            (RESULTS / "recovery_settings.jsonl").write_text("".join(lines), encoding="utf-8")
        if args.second is not None:
            lines = second_model(*args.second, out, texts, common)
            (RESULTS / "second_model.jsonl").write_text("".join(lines), encoding="utf-8")
    if args.only in (None, "facts"):
        (RESULTS / "facts.json").write_text(json.dumps(facts(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
