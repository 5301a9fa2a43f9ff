"""The section on PoD in docs/policies.md, from docs/results/pod.json and pod_adaptation.json (`recipes.pod.adapt`)."""

import json
from pathlib import Path

from tools.policy_claims import Row
from tools.speed_tables import table

ARMS = (("shared", "with sharing"), ("dense", "dense"))


def section(results: Path) -> str:
    """Return the section; nothing if neither file is there."""
    parts = ["## Layers that share keys (PoD)"]
    for name, shown in (("pod.json", _combined), ("pod_adaptation.json", _adaptation)):
        if (results / name).is_file():
            parts.append(shown(json.loads((results / name).read_text(encoding="utf-8"))))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _combined(found: Row) -> str:
    lines = [
        [
            f"`{row['policy']}`", "all" if row["budget"] == 1 else f"{row['budget']:,} tokens", row["weights"],
            f"{row['bits_per_byte']['value']:.3f} [{row['bits_per_byte']['interval'][0]:.2f}, {row['bits_per_byte']['interval'][1]:.2f}]",
            f"{row['facts4']['value']:.2f}", f"{row['fast_bytes'] / 2**20:.2f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    text = (
        f"Groups at delta {found['delta']} (no two layers of this model reach the published 0.5), which drop "
        f"{found['dropped']:.0%} of the distant keys; {found['sinks']} sinks and {found['recent']} recent tokens of their own, "
        f"{found['length']:,} tokens, {found['documents']} documents, text `{found['text']}`. `adapted`: after the training below."
    )
    return f"{text}\n\n{table(['policy', 'budget', 'weights', 'bits per byte', 'four facts', 'fast MiB'], lines)}"


def _adaptation(found: Row) -> str:
    weights = [("shipped", found["before"]), *((f"trained {word}", found["after"][arm]) for arm, word in ARMS)]
    lines = [
        [name, *(f"{losses[arm][kind]:.4f}" for kind in ("text", "answer") for arm, _ in ARMS)]
        for name, losses in weights
    ]
    text = (
        f"Continued training for {found['tokens']:,} tokens, with sharing on, and beside it a dense control that sees the same "
        "tokens: held-out loss in nats, of text and of answers, run with sharing and dense."
    )
    return f"{text}\n\n{table(['weights', 'text, shared', 'text, dense', 'answers, shared', 'answers, dense'], lines)}"
