"""The three patterns in time that AttentionPredictor found in attention, each in the head that shows it most.

The statistics look at the blocks between the sinks and the last `RECENT` blocks, which exist at every step, so a head
that attends to what is near scores nothing. z is the square root of a block's largest probability, which keeps single
peaks from deciding:

- re-access, a head comes back to the same blocks: the share of the `TOP` largest blocks that two steps of the trace
  have in common, over all pairs of steps. By chance it is TOP / blocks.
- sequential, the focus moves on as the text does: the correlation of a row with the row P steps earlier moved on by one
  block, less that with the row as it was (P: block size); the mean over steps. By chance 0; rows that stay give -1.
- seasonal, blocks come back with a period: the autocorrelation of a block over the steps, less its trend (a moving
  average) and weighted by its variance; the most by which a lag of `LAGS` exceeds the least of shorter lags and 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnpred.errors import ShapeError, missing_extra
from attnpred.report.figure_file import save_figure

TOP = 8
SINKS, RECENT = 1, 16  # blocks that are left out
LAGS = (4, 64)
SHOWN = 80  # blocks of a panel
WORDS = {
    "re-access": "the head comes back to the same blocks",
    "sequential": "the focus moves on with the text",
    "seasonal": "blocks come back with a period",
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """A head that shows a pattern: `rows` [T, N] of `layer` and `head`, on the text named `text`."""

    pattern: str
    text: str
    layer: int
    head: int
    score: float
    rows: Tensor


def middle(trace: Tensor, block_size: int = 16) -> Tensor:
    """Return the blocks of `trace` [..., T, N] that are neither sinks nor recent at any of its steps."""
    last = trace.shape[-1] - RECENT - trace.shape[-2] // block_size
    if last - SINKS <= TOP or trace.shape[-2] < 2 * LAGS[1]:
        raise ShapeError(
            f"got {trace.shape[-2]} steps and {max(0, last - SINKS)} blocks between sinks and recent ones, expected at least "
            f"{2 * LAGS[1]} and {TOP + 1}: give a longer trace"
        )
    return trace[..., SINKS:last]


def pattern_scores(trace: Tensor, block_size: int = 16) -> dict[str, Tensor]:
    """Return how much of each pattern a head shows, [layers, Hkv], for a trace [layers, Hkv, T, N] of its last T queries."""
    z = middle(trace.float(), block_size).sqrt()
    often = torch.zeros_like(z).scatter_(-1, z.topk(TOP, -1).indices, 1.0).mean(-2)
    now, before = z[..., block_size:, 1:], z[..., :-block_size, :]
    moved = _correlation(now, before[..., :-1]) - _correlation(now, before[..., 1:])
    return {"re-access": often.square().sum(-1) / TOP, "sequential": moved.mean(-1), "seasonal": season(z)[0]}


def season(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the seasonal statistic of `z` [..., T, blocks] and the lag it was found at."""
    least, most = LAGS
    series = z.transpose(-1, -2)
    flat = series.reshape(-1, 1, series.shape[-1])
    trend = torch.nn.functional.avg_pool1d(flat, most + 1, 1, most // 2, count_include_pad=False)
    spectrum = torch.fft.rfft(series - trend.reshape(series.shape), 2 * series.shape[-1])
    products = torch.fft.irfft(spectrum.abs().square())[..., : most + 1].sum(-2)
    correlation = products / products[..., :1].clamp_min(1e-9)
    above = correlation - correlation.cummin(-1).values.clamp_min(0)
    highest = above[..., least:].max(-1)
    return highest.values, highest.indices + least


def strongest(traces: Mapping[str, Tensor], block_size: int = 16) -> list[Chosen]:
    """Return, for each pattern, the head that shows it most in any of `traces` (text: [layers, Hkv, T, N])."""
    found: dict[str, Chosen] = {}
    for text, trace in traces.items():
        for pattern, scores in pattern_scores(trace, block_size).items():
            layer, head = divmod(int(scores.argmax()), scores.shape[1])
            best = Chosen(pattern, text, layer, head, float(scores.max()), trace[layer, head])
            if pattern not in found or best.score > found[pattern].score:
                found[pattern] = best
    return list(found.values())


def draw(chosen: Sequence[Chosen], path: Path, block_size: int = 16) -> None:
    """Write a PNG with a panel for each head: steps from left to right, those of its blocks that get most attention."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    figure = Figure(figsize=(9, 3.1 * len(chosen) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Any] = list(figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0])
    for axis, head in zip(panels, chosen, strict=True):
        rows = middle(head.rows.float(), block_size)
        start = int(rows.sum(0).unfold(0, min(SHOWN, rows.shape[1]), 1).sum(-1).argmax())
        shown = rows[:, start : start + SHOWN]
        median, high = (max(1e-9, float(shown.quantile(q))) for q in (0.5, 0.998))
        image = axis.imshow(
            shown.T.numpy(), aspect="auto", origin="lower", interpolation="nearest", cmap="magma",
            norm=LogNorm(min(max(median, high / 1000), high / 30), high, clip=True),
            extent=(0, shown.shape[0], SINKS + start - 0.5, SINKS + start + shown.shape[1] - 0.5),
        )  # fmt: skip
        axis.set_title(f"{head.pattern}: {WORDS[head.pattern]}", loc="left", fontsize=10, weight="bold")
        axis.set_title(f"layer {head.layer}, head {head.head}, {head.text}: {_measured(head, rows)}", loc="right", fontsize=9)  # fmt: skip
        axis.set_ylabel("block of the text")
        figure.colorbar(image, ax=axis, pad=0.01, aspect=14).ax.yaxis.set_minor_formatter(NullFormatter())
    panels[-1].set_xlabel("decode step")
    figure.suptitle(
        "largest probability in each block, log scale; black: below the median, or under a thousandth of the brightest",
        fontsize=9,
    )
    save_figure(figure, path, 100)


def _measured(head: Chosen, rows: Tensor) -> str:
    if head.pattern == "re-access":
        return f"{head.score:.2f} (chance {TOP / rows.shape[1]:.2f})"
    return f"{head.score:.2f}" + (f", period {int(season(rows.sqrt())[1])}" if head.pattern == "seasonal" else "")


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-9)
