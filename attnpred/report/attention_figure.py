"""One head's attention over time: what it really was, what was forecast, and which blocks were therefore attended."""

from pathlib import Path
from typing import Any

from attnpred.errors import missing_extra
from attnpred.report.figure_file import save_figure


def draw(true: Any, predicted: Any, selected: Any, title: str, path: Path) -> None:
    """Write a PNG; true, predicted, selected are [T, N] tensors (steps, blocks)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True)
    forecast = (predicted - predicted.median()).clamp_min(0)
    panels = (
        ("true attention (largest probability in each block)", true, PowerNorm(0.5, 0, _bright(true))),
        ("forecast one token ahead, from past attention alone", forecast, PowerNorm(0.5, 0, _bright(forecast))),
        ("blocks attended: sinks, forecast, recent", selected.float(), PowerNorm(1.0, 0, 1)),
    )
    for axis, (label, values, norm) in zip(axes, panels, strict=True):
        axis.imshow(values.T.numpy(), aspect="auto", origin="lower", interpolation="nearest", cmap="magma", norm=norm)
        axis.set_title(label, loc="left", fontsize=10)
        axis.set_ylabel("block of the text")
    axes[-1].set_xlabel("decode step")
    figure.suptitle(title)
    save_figure(figure, path, 110)


def _bright(values: Any) -> float:
    """Return what is drawn brightest: the 99.5th percentile, so that a few recent blocks do not darken all others."""
    ordered = values.flatten().sort().values
    return max(1e-6, float(ordered[int(0.995 * (len(ordered) - 1))]))
