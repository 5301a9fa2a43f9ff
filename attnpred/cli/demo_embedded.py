"""`attnpred demo --model demo`: the embedded model on a long book, full cache against a part of it, several texts."""

from typing import Any

from attnpred.cli.demo_columns import Wanted
from attnpred.cli.tables import drawn

LONGEST = 64
"""Tokens of a question and its answer, and a few to spare."""

WHERE = {
    None: "All keys and values lie in fast memory: this counts what is read, not what is stored.",
    "cpu": "Fast memory holds the chosen blocks and what the policy remembers; all blocks lie in host memory as well.",
    "disk": "Fast memory holds the chosen blocks and what the policy remembers; all blocks lie in a file, which is gone now.",
}


def embedded(wanted: Wanted) -> None:
    """Answer questions about a long book twice: with the full KV cache, and with the part that the first policy chooses."""
    import json
    import sys

    from attnpred.errors import ConfigError
    from attnpred.evaluation.book import demo_book
    from attnpred.evaluation.comparison import compare, compressed
    from attnpred.hf import load_model

    figure, attention = wanted.figure, wanted.attention
    variant, plan = wanted.variants[0], wanted.plan
    policy, context, steps = variant.label, plan.context, plan.steps
    model, tokenizer = load_model("demo", dtype=wanted.dtype)
    room = int(model.config.max_position_embeddings) - max(steps, LONGEST)
    if context > room:
        raise ConfigError(
            f"got {context} tokens of context and {steps} steps, expected at most {room} before them: the model was made for "
            f"{model.config.max_position_embeddings} in all; lower --context or --steps"
        )
    book = demo_book() if wanted.book is None else wanted.book
    chooses, settings = compressed(model, variant, wanted.config, context, wanted.compression)
    result = compare(
        model,
        tokenizer,
        book,
        plan,
        policy,
        chooses,
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
    if wanted.as_json:
        print(json.dumps(result))


def _table(result: dict[str, Any], policy: str) -> str:
    full, part = result["full"], result["predicted"]
    shown = result["answers"][:: max(1, len(result["answers"]) // 6)][:6]
    head = ["Question (after the whole text)", "planted", "full", policy]
    asked = drawn(head, [[r["question"], r["expected"], r["full"], r["predicted"]] for r in shown], numbers=True)
    rows = [
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
    lines = [
        asked,
        "",
        drawn(["", "full cache", policy], rows, numbers=True),
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
