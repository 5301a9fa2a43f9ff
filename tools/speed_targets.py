"""What was wanted of speed, and what the results say: the first table of docs/speed.md (`tools.speed_tables`)."""

from typing import Any

Row = dict[str, Any]
CALL_BUDGET = 1024
"""The budget of the sparse calls that are shown."""

K = 1024


def number(value: float | None) -> str:
    """Return three or more digits of a figure, a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def of_steps(found: Row) -> list[list[str]]:
    """Targets of whole steps."""
    every = found.get("ratios", [])
    ratios = {row["context"]: row for row in every if (row["shape"], row["dtype"]) == ("1b", "bfloat16")}
    growth = [row for row in found.get("growth", []) if (row["shape"], row["dtype"]) == ("1b", "bfloat16")]

    def over(key: str, *contexts: int) -> str:
        return " / ".join(number(ratios.get(context, {}).get(key)) for context in contexts)

    lines = []
    if ratios:
        wide = over("predicted_over_floor", 16 * K, 32 * K, 64 * K)
        lines.append(["1B bf16 step over its floor, 16K / 32K / 64K", "at most 1.10", wide])
    for row in growth:
        if row["variant"] == "predicted":
            first, last = row["contexts"]
            lines.append([f"growth of that step, {first:,} to {last:,} tokens", "at most 1.10", number(row["growth"])])
    if ratios:
        default = over("transformers_over_predicted", 32 * K)
        lines.append(["transformers' default over that step, 32K", "at least 8", default])
        strongest = over("best_dense_over_predicted", 32 * K, 64 * K)
        lines.append(["the strongest dense path over that step, 32K / 64K", "at least 1.3 / 1.6", strongest])
    paired = [row for row in every if "best_dense_over_predicted" in row]
    if paired:
        worst = min(paired, key=lambda row: row["best_dense_over_predicted"])
        at = f"{number(worst['best_dense_over_predicted'])} ({worst['shape']}, {worst['context']:,} tokens)"
        lines.append(["the strongest dense path over `predicted`, at worst", "at least 0.97", at])
    for row in ratios.values():
        if "fits_over_packed" in row:
            reached = f"{number(row['fits_over_packed'])} at {row['context']:,} tokens"
            lines.append(["attaching when the context fits the budget, over `packed`", "at most 1.02", reached])
    if "first_token_s" in found:
        first = found["first_token_s"]
        extra = f"{first['warm'] - first['torch']:+.2f} s"
        lines.append(["first token with compiled kernels at hand, over plain torch", "under 1 s", extra])
    return lines


def of_calls(found: Row) -> list[list[str]]:
    """Targets of single calls of attention."""
    wanted = ("8b", "bfloat16", 128 * K)
    own = [row for row in found["rows"] if (row["shape"], row["dtype"], row["context"]) == wanted]
    sparse, dense = ([row for row in own if row.get("budget") == budget] for budget in (CALL_BUDGET, None))
    if not sparse or not dense:
        return []
    call, best = (min(rows, key=lambda row: row["us"]) for rows in (sparse, dense))
    over, under = number(call["us"] / call["limit_us"]), number(best["us"] / call["us"])
    return [
        ["sparse call, 8B bf16 128K, over the limit of random blocks", "at most 1.6", over],
        ["the best dense call over that call", "at least 40", under],
    ]


def of_selection(found: Row) -> list[list[str]]:
    """Targets of choosing."""
    own = [row for row in found["rows"] if row["variant"] == "predicted" and row["context"] >= 8 * K]
    if not own:
        return []
    worst = max(own, key=lambda row: row["us"] / row["attention_us"])
    reached = f"{number(worst['us'] / worst['attention_us'])} at {worst['context']:,} tokens"
    return [["choosing over the attention call that it serves, 8K to 128K, at worst", "under 1", reached]]


def of_rivals(found: Row) -> list[list[str]]:
    """Targets of a token beside other engines; llama.cpp with the keys and values that are better for it."""
    ms: dict[tuple[str, str, int], float] = {}
    for row in found["rows"]:
        key = row["engine"], row["weights"], row["context"]
        ms[key] = min(row["ms_per_token"], ms.get(key, row["ms_per_token"]))

    def over(engine: str, theirs: str, ours: str, *contexts: int) -> str:
        pairs = [(ms.get((engine, theirs, at)), ms.get(("attnpred", ours, at))) for at in contexts]
        return " / ".join(number(a / b if a and b else None) for a, b in pairs)

    first, last = (ms.get(("attnpred", "int8", at)) for at in (K, 16 * K))
    return [
        [
            "llama.cpp Q8_0 over `predicted` int8, SmolLM2, a token at 2K / 4K / 8K / 16K",
            "at least 1.0 / 1.5 / 2.5 / 4",
            over("llama.cpp", "Q8_0", "int8", 2 * K, 4 * K, 8 * K, 16 * K),
        ],
        [
            "llama.cpp Q4_1 over `predicted` int4, the same, 4K / 8K / 16K",
            "at least 1.0 / 2 / 3",
            over("llama.cpp", "Q4_1", "int4", 4 * K, 8 * K, 16 * K),
        ],
        ["transformers in fp32 over `predicted` int8, 8K", "at least 5", over("transformers", "fp32", "int8", 8 * K)],
        ["growth of the token in int8, 1K to 16K", "at most 1.15", number(last / first if first and last else None)],
    ]


def of_busy(found: Row) -> list[list[str]]:
    """The target of a token beside other programs."""
    ratios = {(row["weights"], row["busy"]): row["over_rest"] for row in found["rows"]}
    reached = f"{number(ratios.get(('int8', 1)))} / {number(ratios.get(('int8', 2)))}"
    return [["a token beside one / two processes that spin, over the same at rest", "- / at most 3", reached]]


def of_products(found: Row) -> list[list[str]]:
    """Targets of one row times a matrix."""
    large = [row for row in found["rows"] if row["vectors"] == 1 and row["bytes"] >= 1 << 20]
    worst = [
        min((row["share"] for row in large if row["variant"] == name), default=None)
        for name in ("int8", "int4", "bf16")
    ]
    reached = " / ".join("-" if share is None else f"{share:.0%}" for share in worst)
    what = "one row times a matrix of 1 MiB or more, of the stream, at worst: int8 / int4 / bf16"
    return [[what, "at least 80%", reached]]


def targets(found: dict[str, Row]) -> list[list[str]]:
    """Return what, wanted, reached, for all that was measured."""
    parts = {
        "rivals": of_rivals,
        "linear": of_products,
        "busy": of_busy,
        "decode": of_steps,
        "attention": of_calls,
        "selection": of_selection,
    }
    return [line for name, part in parts.items() if name in found for line in part(found[name])]
