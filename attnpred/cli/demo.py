"""`attnpred demo`: the main job on the embedded model. A long book, hidden facts, full cache against a part of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from attnpred.cli.options import DtypeOption, cache_options
from attnpred.config import CacheConfig

LATE_SHARE = 0.06
"""Unless told otherwise, with a slow tier. Of the 34 blocks of a selection 2: what is fetched late is waited for."""

WHERE = {
    None: "All keys and values lie in fast memory: this counts what is read, not what is stored.",
    "cpu": "Fast memory holds the chosen blocks and what the policy remembers; all blocks lie in host memory as well.",
    "disk": "Fast memory holds the chosen blocks and what the policy remembers; all blocks lie in a file, which is gone now.",
}


@cache_options(
    defaults={"offload": "disk", "calibration_interval": 0},
    fixed={"budget": 1.0, "measure_recovery": False},
)
def demo(
    config: CacheConfig,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the book that are read.")] = 8192,
    compression: Annotated[float, typer.Option(help="How many times less KV is to be read per step, all told.")] = 13.0,
    policy: Annotated[str, typer.Option(help="Which policy chooses (see `attnpred info`).")] = "predicted",
    documents: Annotated[int, typer.Option(min=1, help="Texts with planted facts.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Tokens of the continuation.")] = 256,
    text: Annotated[Path | None, typer.Option(help="A text of your own instead of the embedded book.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Write a picture of a head's attention over time (extra `plot`).")
    ] = None,
    attention: Annotated[
        Path | None, typer.Option(help="Write that attention as numbers, for `attnpred report --attention`.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the planted facts.")] = 1,
    dtype: DtypeOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Answer questions about a long book twice: with the full KV cache, and with a predicted part of it."""
    import json
    import sys
    from dataclasses import replace

    from attnpred.errors import ConfigError
    from attnpred.evaluation.book import demo_book
    from attnpred.evaluation.comparison import Plan, compare, demo_settings, digest_share
    from attnpred.hf import load_model, make_policy

    if text is not None and not text.is_file():
        raise ConfigError(f"got {text}, expected a text file")
    for path in (figure, attention):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"got {path}, expected a file in a folder that exists")
    model, tokenizer = load_model("demo", dtype=dtype)
    book = demo_book() if text is None else text.read_text(encoding="utf-8", errors="replace")
    plan = Plan(context=context, documents=documents, steps=steps, seed=seed)
    layers = int(model.config.num_hidden_layers)
    chooses = make_policy(policy, None, model.config, config)
    digests = digest_share(model.config, chooses, next(model.parameters()).element_size(), config.block_size)
    settings = demo_settings(config, context, compression, layers, digests)
    if settings.late_share is None and settings.offload is not None:
        settings = replace(settings, late_share=LATE_SHARE)
    result = compare(
        model,
        tokenizer,
        book,
        plan,
        policy,
        settings,
        say=lambda line: print(f"  {line} ...", file=sys.stderr, flush=True),
    )
    picture = result.pop("picture")
    if picture is None and attention is not None:
        print(f"policy {policy} forecasts nothing: {attention} was not written", file=sys.stderr)
    if picture is not None:
        title = f"layer {picture.layer}, kv head {picture.head}, {context} tokens of context"
        if figure is not None:
            from attnpred.report.attention_figure import draw

            draw(picture.true, picture.predicted, picture.selected, title, figure)
        if attention is not None:
            from attnpred.report.attention import HeadAttention, save_attention

            save_attention(HeadAttention(title, picture.true, picture.predicted, picture.selected), attention)
    result |= {
        "policy": policy,
        "offload": settings.offload,
        "late_share": settings.late_share,
        "figure": str(figure) if figure is not None and picture is not None else None,
        "attention": str(attention) if attention is not None and picture is not None else None,
    }
    print(_table(result, policy))
    if as_json:
        print(json.dumps(result))


def _table(result: dict[str, Any], policy: str) -> str:
    full, part = result["full"], result["predicted"]
    shown = result["answers"][:: max(1, len(result["answers"]) // 6)][:6]
    width = max(len(row["question"]) for row in shown)
    lines = [f"{'Question (after the whole text)':<{width}}  {'planted':>8}{'full':>8}{policy:>11}"]
    lines += [f"{r['question']:<{width}}  {r['expected']:>8}{r['full']:>8}{r['predicted']:>11}" for r in shown]
    lines.append("")
    rows = [
        ("", "full cache", policy),
        ("facts answered", f"{full['correct']} of {full['total']}", f"{part['correct']} of {part['total']}"),
        ("bits per byte, continuation", f"{full['bits_per_byte']:.3f}", f"{part['bits_per_byte']:.3f}"),
        ("tokens attended per step", f"{full['tokens_attended']:.0f}", f"{part['tokens_attended']:.0f}"),
        ("KV bytes read per step", f"{full['read_bytes_per_step']:,.0f}", f"{part['read_bytes_per_step']:,.0f}"),
        ("fast memory, bytes", f"{full['fast_bytes']:,}", f"{part['fast_bytes']:,}"),
        ("ms per token", f"{full['ms_per_token']:.1f}", f"{part['ms_per_token']:.1f}"),
    ]
    if "hit_rate" in part:
        rows.append(("blocks there when needed", "", f"{part['hit_rate']:.1%}"))
        rows.append(("ms per token waiting for them", "", f"{part['exposed_wait_ms']:.2f}"))
    lines += [f"{name:<30}{left:>16}{right:>16}" for name, left, right in rows]
    lines += [
        "",
        f"{result['compression']:.1f} times less KV read per step, over all layers, digests and calibration included "
        f"(budget {result['budget_tokens']} of {result['context_tokens']} tokens per head and layer).",
        f"{result['attention_recovery']:.1%} of the true attention falls on the chosen blocks; "
        f"{result['recovery_ratio']:.1%} of what the best blocks of that number would get.",
        WHERE[result["offload"]],
    ]
    if result["figure"]:
        lines.append(f"Picture: {result['figure']}")
    if result["attention"]:
        lines.append(f"Attention: {result['attention']} (see `attnpred report --attention`)")
    return "\n".join(lines)
