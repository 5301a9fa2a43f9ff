"""Orderings that papers publish, held against rows of `attnpred eval`: which of them does this model reproduce?

A claim says that one policy is ahead of another. Both are compared in pairs, document by document, over all tasks that have
questions and all budgets below `SMALL`: questions about one document, and one question at several budgets, are not
independent, so a document is one sample. It reproduces if the 95 % interval of the mean difference lies above
zero, it is reversed if the interval lies below, and otherwise nothing can be said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnpred.evaluation.statistics import difference

Row = dict[str, Any]
SMALL = 0.2
"""Shares of the context: at larger ones nearly everything is right for everybody."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`ahead` is said to be better than `behind`: words of rows, and where it is said."""

    ahead: str
    behind: str
    source: str


CLAIMS = (
    Claim("predicted", "streaming", "AttentionPredictor, LongBench at 1K"),
    Claim("predicted", "h2o", "AttentionPredictor, LongBench at 1K"),
    Claim("predicted", "snapkv", "AttentionPredictor, LongBench at 1K"),
    Claim("predicted", "quest", "AttentionPredictor, LongBench at 1K and AIME24"),
    Claim("predicted", "ema", "AttentionPredictor, a learned forecast over heuristics"),
    Claim(
        "predicted:predictor=attention-predictor-cnn,calibration_interval=5",
        "ema",
        "AttentionPredictor, a learned forecast over heuristics",
    ),
    Claim("h2o", "streaming", "AttentionPredictor, LongBench at 1K"),
    Claim("snapkv", "h2o", "AttentionPredictor, LongBench at 1K"),
    Claim("quest", "snapkv", "AttentionPredictor, LongBench at 1K"),
    Claim("quest", "h2o", "Quest, passkey retrieval"),
    Claim("tidal", "quest", "TidalDecode, needle at 100K and LongBench"),
    Claim("tactic", "quest", "Tactic, RULER"),
    Claim("tactic:block_size=1", "quest", "Tactic, RULER"),
    Claim("recycled", "streaming", "Recycled Attention, RULER"),
    Claim("recycled", "h2o", "Recycled Attention, RULER"),
    Claim("seer", "quest", "SeerAttention-R, AIME at equal budgets"),
    Claim("cascading", "streaming", "Cascading KV cache, passkey retrieval"),
    Claim("sepllm", "streaming", "SepLLM, streaming perplexity"),
    Claim("hip", "streaming", "HiP, LongBench"),
    Claim("hip:block_size=2", "streaming", "HiP, LongBench"),
    Claim("fastgen", "h2o", "FastGen, at equal cache"),
    Claim("subgen", "h2o", "SubGen, line retrieval"),
)


def compared(rows: Sequence[Row], ahead: str, behind: str) -> dict[str, Any] | None:
    """Return the paired difference by document, over all budgets that both have; None if there are none."""
    found: list[dict[str, float]] = []
    for name in (ahead, behind):
        own = [row for row in rows if row["policy"] == name and row["metric"] == "accuracy" and row["budget"] < SMALL]
        found.append(
            {f"{row['task']}/{row['budget']}/{item['name']}": item["value"] for row in own for item in row["items"]}
        )
    documents: list[dict[str, list[float]]] = [{}, {}]
    for key in (name for name in found[0] if name in found[1]):  # in the rows' order: resampling depends on it
        task, _, item = key.split("/", 2)
        for own, values in zip(found, documents, strict=True):
            values.setdefault(f"{task}/{item.split('/')[0]}", []).append(own[key])
    ours, theirs = ({name: sum(x) / len(x) for name, x in values.items()} for values in documents)
    result = difference(ours, theirs)
    return result if result["n"] else None


def verdict(result: dict[str, Any] | None) -> str:
    """Say in words what a paired difference shows."""
    if result is None:
        return "not measured"
    low, high = result["interval"]
    return "reproduces" if low > 0 else "reversed" if high < 0 else "cannot be told apart"
