"""The picture of the demo: the page of the book that holds an answer, marked where the model read, beside the maps.

For a reader who does not know attention maps. The page comes first: the darker a passage, the more of the model's heads
read it while the answer was written. A strip shows the same for the whole text, and where the page lies in it. The maps
show one head, word by word of the answer: what it would look at, what was forecast, what was read.
"""

import textwrap
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from attnpred.errors import missing_extra
from attnpred.files import write_bytes

WIDTH, LINES = 84, 47
"""Characters of a line, and lines, of the page."""
INK, QUIET, FACT = "#1c1f24", "#5b626c", "#0b57a4"
PAPER = "#fffdf8"
MARKER = ("#fffdf8", "#fff0bd", "#ffd978", "#fbb040", "#ef8626", "#d9541e")
"""From nobody to everybody."""


@dataclass(frozen=True, slots=True)
class PageView:
    """What the picture is made of. Blocks are N, words of the answer T.

    text; spans: where each block begins and ends in it; fact: where the planted sentence does. share [N]: of all heads and
    words, how many read the block. true, forecast (None where the policy makes none), selected [T, N]: one head's maps.
    """

    model: str
    source: str
    question: str
    answer: str
    heads: int
    head_name: str
    words: list[str]
    text: str
    spans: list[tuple[int, int]]
    fact: tuple[int, int]
    share: Tensor
    true: Tensor
    forecast: Tensor | None
    selected: Tensor

    @property
    def times_less(self) -> float:
        """How many times fewer blocks a head reads than there are."""
        return 1 / float(self.share.mean())


def draw_page(view: PageView, path: Path) -> None:
    """Write the picture as PNG. Raises `MissingExtraError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    figure = Figure(figsize=(16, 10.6), facecolor="white", dpi=110)
    FigureCanvasAgg(figure)
    colours = LinearSegmentedColormap.from_list("marker", MARKER)
    norm = PowerNorm(0.5, 0, 1)
    lines = page_lines(view.text, view.fact)
    _head(figure, view)
    _page(figure.add_axes((0.025, 0.075, 0.525, 0.765)), view, lines, colours, norm)
    _strip(figure.add_axes((0.575, 0.075, 0.03, 0.765)), view, lines, colours, norm)
    _legend(figure, colours, norm)
    _maps(figure, view)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())


def page_lines(text: str, fact: tuple[int, int]) -> list[tuple[int, str]]:
    """Return the lines of a page around `fact`: where each begins in `text`, and its words."""
    lines: list[tuple[int, str]] = []
    start = 0
    for paragraph in text.split("\n"):
        place = start
        for line in textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False) or [""]:
            place = text.index(line, place)
            lines.append((place, line))
            place += len(line)
        start += len(paragraph) + 1
    middle = max(i for i, (place, _) in enumerate(lines) if place <= fact[0])
    first = max(0, min(middle - LINES // 2, len(lines) - LINES))
    return lines[first : first + LINES]


def _head(figure: Any, view: PageView) -> None:
    figure.text(0.025, 0.957, "What the model read to answer one question", fontsize=21, weight="bold", color=INK)
    figure.text(0.025, 0.925, f"Asked: {view.question}", fontsize=13, color=INK)
    figure.text(
        0.025,
        0.9,
        textwrap.shorten(f"{view.model} answered: {view.answer}", 95, placeholder=" ..."),
        fontsize=13,
        color=FACT,
        weight="bold",
    )
    figure.text(
        0.025, 0.853,
        f"It had read {view.source}. For each word of the answer, each of its {view.heads} heads\n"
        f"(the parts of it that look things up) went back to 1/{view.times_less:.0f} of the text only: to the passages marked here.",
        fontsize=10.5, color=QUIET, linespacing=1.35,
    )  # fmt: skip


def _page(axes: Any, view: PageView, lines: list[tuple[int, str]], colours: Any, norm: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.set(xlim=(-1.5, WIDTH + 1.5), ylim=(LINES + 0.4, -0.9), xticks=[], yticks=[], facecolor=PAPER)
    for side in axes.spines.values():
        side.set_color("#c9c4b8")
    box = axes.get_window_extent()
    font = {
        "fontfamily": "monospace",
        "parse_math": False,
        "fontsize": box.width / (WIDTH + 3) / 0.602 * 72 / axes.figure.dpi,
    }
    while (wide := _letter(axes, box.width, font)) > 1:
        font["fontsize"] *= 0.99
    for row, (place, line) in enumerate(lines):
        end = place + len(line)
        for (first, last), share in zip(view.spans, view.share.tolist(), strict=True):
            left, right = max(first, place), min(last, end)
            if left < right:
                colour = colours(norm(share))
                axes.add_patch(
                    Rectangle(((left - place) * wide, row - 0.5), (right - left) * wide, 1.0, color=colour, linewidth=0)
                )
        left, right = max(view.fact[0], place), min(view.fact[1], end)
        if left < right:
            axes.plot(
                [(left - place) * wide, (right - place) * wide],
                [row + 0.44] * 2,
                color=FACT,
                linewidth=2.6,
                solid_capstyle="butt",
            )
        axes.text(0, row, line, va="center_baseline", color=INK, **font)


def _letter(axes: Any, width: float, font: dict[str, Any]) -> float:
    """Return how wide a letter is drawn, in those of `axes`: they are put on whole pixels, so it has to be measured."""
    ruler = axes.text(0, 0, "x" * WIDTH, **font)
    found = float(ruler.get_window_extent().width) / width * (WIDTH + 3) / WIDTH
    ruler.remove()
    return found


def _strip(axes: Any, view: PageView, lines: list[tuple[int, str]], colours: Any, norm: Any) -> None:
    from matplotlib.patches import Rectangle

    blocks = len(view.share)
    axes.imshow(view.share[:, None].numpy(), aspect="auto", cmap=colours, norm=norm, extent=(0, 1, blocks, 0))
    axes.set(xticks=[], yticks=[])
    axes.set_title("whole\ntext", fontsize=9, color=QUIET, pad=5)
    begin, end = lines[0][0], lines[-1][0] + len(lines[-1][1])
    shown = [i for i, (first, last) in enumerate(view.spans) if first < end and last > begin]
    axes.add_patch(Rectangle((0, shown[0]), 1, len(shown), fill=False, edgecolor=INK, linewidth=1.6, clip_on=False))
    place = next(i for i, (_, last) in enumerate(view.spans) if last > view.fact[0]) + 0.5
    axes.annotate("", (1, place), (1.45, place), annotation_clip=False,
                  arrowprops={"arrowstyle": "-|>", "color": FACT, "linewidth": 1.5})  # fmt: skip
    middle = (shown[0] + shown[-1] + 1) / 2
    axes.annotate("this page", (0, middle), (-0.25, middle), ha="right", va="center", rotation=90, fontsize=9, color=INK,
                  annotation_clip=False)  # fmt: skip


def _legend(figure: Any, colours: Any, norm: Any) -> None:
    from matplotlib.cm import ScalarMappable

    axes = figure.add_axes((0.035, 0.043, 0.24, 0.014))
    bar = figure.colorbar(
        ScalarMappable(norm, colours), cax=axes, orientation="horizontal", ticks=[0, 0.05, 0.2, 0.5, 1]
    )
    bar.ax.set_xticklabels(["none", "5 %", "20 %", "half", "all"], fontsize=9, color=INK)
    figure.text(
        0.305, 0.044, "of the heads read this passage (mean over the words of the answer)", fontsize=10, color=INK
    )
    figure.add_artist(_underline())
    figure.text(
        0.327, 0.018, "the sentence that holds the answer, hidden in the book by the demo", fontsize=10, color=INK
    )


def _underline() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([0.305, 0.322], [0.0225, 0.0225], color=FACT, linewidth=2.2)


def _maps(figure: Any, view: PageView) -> None:
    from matplotlib.colors import PowerNorm

    maps = [("What it would look at, if it read everything", view.true)]
    if view.forecast is not None:
        maps.append(
            ("What the forecast expected, one word ahead", (view.forecast - view.forecast.median()).clamp_min(0))
        )
    maps.append(("What it read", view.selected.float()))
    figure.text(
        0.675,
        0.868,
        f"One of the {view.heads} heads ({view.head_name}), word by word",
        fontsize=12,
        weight="bold",
        color=INK,
    )
    height = 0.70 / len(maps)
    for i, (title, values) in enumerate(maps):
        axes = figure.add_axes((0.675, 0.845 - (i + 1) * height, 0.31, height - 0.045))
        top = 1.0 if title == "What it read" else bright(values)
        axes.imshow(values.T.numpy(), aspect="auto", interpolation="nearest", cmap="magma", norm=PowerNorm(0.5, 0, top))
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
        axes.set_yticks([0, len(view.share) - 1], ["beginning", "end"], fontsize=8.5)
        axes.set_ylabel("place in the text", fontsize=9, color=QUIET)
        place = next(i for i, (first, last) in enumerate(view.spans) if last > view.fact[0])
        axes.annotate("", (-0.5, place), (-0.5 - 0.02 * len(view.words), place), annotation_clip=False,
                      arrowprops={"arrowstyle": "-|>", "color": FACT, "linewidth": 1.5})  # fmt: skip
        axes.set_xticks(
            range(len(view.words)), view.words if i == len(maps) - 1 else [], fontsize=9, rotation=40, ha="right"
        )
        axes.tick_params(length=2)
    figure.text(
        0.675, 0.02, "Bright: much attention. Blue arrows: the sentence that holds the answer.", fontsize=10, color=INK
    )


def bright(values: Tensor) -> float:
    """Return what is drawn brightest: the 99.5th percentile, so that a few recent blocks do not darken all others."""
    ordered = values.flatten().sort().values
    return max(1e-6, float(ordered[int(0.995 * (len(ordered) - 1))]))
