"""What every policy recovers at every budget: one line per policy, the oracle above them, ours in front.

Rows are those of `attnpred eval --tasks recovery`, of one kind of text and one length. The left panel has the recovery
ratio with its 95 % interval as a band, the right one the attention recovery that it is a ratio of (no interval there:
the rows have none). Colour says what a policy may know, markers tell the policies of one colour apart, so that the
figure can be read in grey too. Names stand at the lines' ends, moved apart where they would cover each other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnpred.errors import ConfigError, missing_extra
from attnpred.report.figure_file import save_figure

Row = dict[str, Any]
PAPER = "predicted:predictor=attention-predictor-cnn"
QUERY = ("mean_key", "quest")  # they score with the query of the step itself
FAMILIES = {  # what a policy may know: its colour (Okabe and Ito) and line width
    "oracle: the best blocks, sinks and recent window forced": ("#000000", 1.4),
    "predicted (ours)": ("#0072B2", 2.6),
    "rivals that see the query of the step": ("#D55E00", 1.4),
    "rivals that look back only": ("#8A8A8A", 1.1),
}
ORACLE, OURS, SEEING, BACK = FAMILIES
NAMES = {
    "predicted": "predicted, with the query",
    "predicted:late_share=0": "predicted, forecast only",
    "predicted:late_share=0.06": "predicted, at most 6 % late",
}
MARKERS = "os^Dv<>PXph*d8"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG; `rows` have one value for each policy and budget."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    _check(rows)
    budgets = sorted({row["budget"] for row in rows})
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    ratio, mass = figure.subplots(1, 2, width_ratios=(1.6, 1))
    ends: list[tuple[float, str, str]] = []
    for number, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        own = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["budget"])
        family = family_of(policy)
        colour, width = FAMILIES[family]
        front = {OURS: 4, ORACLE: 3, SEEING: 2.5}.get(family, 2)
        shares = [row["budget"] for row in own]
        for axis, key in ((ratio, "value"), (mass, "recovery")):
            axis.plot(
                shares, [row[key] for row in own], color=colour, linewidth=width, zorder=front, label=policy,
                linestyle="--" if family == ORACLE else "-", marker=MARKERS[number % len(MARKERS)], markersize=5,
                markerfacecolor="white" if family == BACK else colour,
            )  # fmt: skip
        low, high = zip(*(row["interval"] for row in own), strict=True)
        ratio.fill_between(shares, low, high, color=colour, alpha=0.22 if family == OURS else 0.06, linewidth=0)
        ends.append((own[-1]["value"], name_of(policy), colour))
    for axis, label in ((ratio, "recovery ratio (band: 95 % interval)"), (mass, "attention recovery")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [f"1/{round(1 / budget)}" for budget in budgets], fontsize=9)
        axis.minorticks_off()
        axis.set_xlabel("budget: share of the context")
        axis.set_title(label, loc="left", fontsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _name_ends(ratio, budgets[-1], ends)
    families = [name for name in FAMILIES if any(family_of(row["policy"]) == name for row in rows)]
    keys = [Line2D([], [], color=FAMILIES[f][0], linewidth=3, linestyle="--" if f == ORACLE else "-") for f in families]
    figure.legend(keys, families, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    first = rows[0]
    figure.suptitle(f"{first['length']:,} tokens of context, {first['n']} documents, {first['steps']} steps each")
    save_figure(figure, path, 100)


def family_of(policy: str) -> str:
    """Return which of `FAMILIES` a policy, as `--policies` names it, belongs to."""
    name = policy.partition(":")[0]
    if name == "predicted":
        return BACK if policy.startswith(PAPER) else OURS
    return ORACLE if name == "oracle" else SEEING if name in QUERY else BACK


def name_of(policy: str) -> str:
    """Return the name at the line: the policy, and the values of its options but the calibration interval."""
    if policy.startswith(PAPER):
        return "AttentionPredictor's CNN"
    name, _, options = policy.partition(":")
    values = [
        option.partition("=")[2] for option in options.split(",") if not option.startswith("calibration_interval")
    ]
    return NAMES.get(policy, " ".join([name, *values]).strip())


def spread(values: Sequence[float], gap: float, high: float) -> list[float]:
    """Return places, close to the falling `values`, that are at least `gap` apart and at most `high`."""
    places = list(values)
    for _ in range(200):  # neighbours that are too close push each other apart, until none is
        for i in range(len(places) - 1):
            short = gap - (places[i] - places[i + 1])
            if short > 0:
                places[i] += short / 2
                places[i + 1] -= short / 2
        places = [min(place, high - i * gap) for i, place in enumerate(places)]
    return places


def _name_ends(axis: Any, budget: float, ends: list[tuple[float, str, str]]) -> None:
    bottom, top = axis.get_ylim()
    ends.sort(reverse=True)
    places = spread([value for value, _, _ in ends], (top - bottom) * 0.036, top)
    for place, (value, name, colour) in zip(places, ends, strict=True):
        dark = "#555555" if colour == FAMILIES[BACK][0] else colour
        axis.annotate(
            name, (budget, value), (budget * 1.16, place), color=dark, fontsize=9, va="center", annotation_clip=False,
            weight="bold" if colour == FAMILIES[OURS][0] else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)},
        )  # fmt: skip


def _check(rows: Sequence[Row]) -> None:
    cells = [(row["policy"], row["budget"]) for row in rows]
    if not rows or len(set(cells)) < len(cells):
        raise ConfigError(
            f"got {len(rows)} rows for {len(set(cells))} pairs of policy and budget, expected one for each and at least "
            "one: give rows of one text and one length"
        )
