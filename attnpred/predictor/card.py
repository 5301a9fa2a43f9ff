"""Model cards, in Markdown: what a predictor is, and what its training measured. Every figure comes from the log."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnpred.predictor.predictor_config import HUB_ID, PredictorConfig

FORECAST = "Forecasts which blocks of the KV cache the next token will attend (method: arXiv 2502.04077)."
GATES = {
    "seer-gate": "Says which blocks of the KV cache a query will attend, for policy `seer` (method: arXiv 2506.08889)."
}
"""What a predictor does that looks at the query of the step, by its kind; all others forecast."""


def model_card(config: PredictorConfig, details: str = "") -> str:
    """Return a model card in Markdown with the Hub's front matter; `details` goes below the facts of `config`."""
    facts = {
        "Kind": config.kind,
        "Trained for": config.base_model,
        "Fingerprint": config.fingerprint,
        "Block size": f"{config.block_size} tokens",
        "History": f"{config.history} rows" if config.kind not in GATES else "",
        "Trained on": config.trained_on,
    }
    lines = ["---", "library_name: attnpred", "tags: [attnpred, kv-cache, long-context]"]
    if HUB_ID.fullmatch(config.base_model):
        lines.append(f"base_model: {config.base_model}")
    lines += ["---", "", "# Attention predictor", ""]
    lines += [GATES.get(config.kind, FORECAST), ""]
    lines += [f"* {name}: {value}" for name, value in facts.items() if value]
    use = 'predictor = attnpred.Predictor.from_pretrained("this directory or Hub id")'
    lines += ["", "```python", "import attnpred", "", use, "```", ""]
    return "\n".join(lines) + (f"\n{details.rstrip()}\n" if details else "")


def training_details(
    log: Sequence[Mapping[str, Any]], best_step: int, settings: Mapping[str, Any], training: int, held_out: int
) -> str:
    """Return what the log of a run tells: `training` and `held_out` are numbers of documents."""
    last = log[-1]
    shown = [
        line for i, line in enumerate(log) if i % -(-len(log) // 16) == 0 or line is last or line["step"] == best_step
    ]
    lines = [
        "## Training",
        "",
        f"{last['step']} steps in {last['seconds']:.0f} s on {training} documents, {held_out} more held out.",
        f"Settings: {', '.join(f'{name}={value:.4g}' for name, value in settings.items())}.",
        "",
        "## Measured on the held-out documents",
        "",
        "Recovered: the attention of the next token inside the chosen blocks, as a share of what the best blocks hold,",
        f"where sinks, recent window and chosen blocks are {settings['budget_fraction']:.3f} of all blocks.",
        f"The weights saved here are those of step {best_step}.",
        "",
        "| step | training loss | recovered | by an average of the rows (EMA) | by the last row |",
        "|---|---|---|---|---|",
    ]
    for line in shown:
        shares = " | ".join(f"{line['recovery'][name]:.4f}" for name in ("cnn", "ema", "last_step"))
        lines.append(f"| {line['step']} | {line['train_loss']:.3e} | {shares} |")
    return "\n".join(lines)
