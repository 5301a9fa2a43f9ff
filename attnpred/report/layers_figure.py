"""How similar the attention of a model's layers is: a heat map for each kv head, with a frame around each group."""

from pathlib import Path
from typing import Any

from attnpred.errors import missing_extra
from attnpred.predictor.layer_groups import LayerGroups
from attnpred.report.figure_file import save_figure, try_out_figure

COLUMNS = 4
FORMATS = (".png", ".svg")


def draw(found: LayerGroups, path: Path) -> None:
    """Write a PNG or an SVG, as the name says."""
    try_out_figure(path, FORMATS)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    columns = min(COLUMNS, found.kv_heads)
    lines = -(-found.kv_heads // columns)
    figure = Figure(figsize=(3.1 * columns + 1.2, 3.1 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Any] = list(figure.subplots(lines, columns, squeeze=False).flat)
    image: Any = None
    for head, axis in enumerate(panels):
        if head >= found.kv_heads:
            axis.set_visible(False)
            continue
        image = axis.imshow(found.similarity[head], vmin=0, vmax=1, cmap="cividis", origin="lower")
        for group in found.groups[head]:
            low, size = found.layers.index(group[0]), len(group)
            axis.add_patch(Rectangle((low - 0.5, low - 0.5), size, size, fill=False, edgecolor="#D55E00", linewidth=2))
        ticks = range(0, len(found.layers), max(1, len(found.layers) // 8))
        axis.set_xticks(ticks, [found.layers[i] for i in ticks], fontsize=8)
        axis.set_yticks(ticks, [found.layers[i] for i in ticks], fontsize=8)
        axis.set_title(f"kv head {head}: {len(found.groups[head])} groups", fontsize=9)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=panels, label="1 - Jensen-Shannon divergence", shrink=0.8)
    figure.suptitle(
        f"{found.base_model}: {found.dropped:.0%} of distant keys need not be kept at delta {found.delta:g}",
        fontsize=10,
    )
    save_figure(figure, path, 110)
