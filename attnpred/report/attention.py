"""True against predicted attention of one head: the file that `attnpred demo --attention` writes, and its pictures.

The file is safetensors. Its tensors true and predicted (fp32) and selected (bool) are [T, N], steps of decoding by blocks
of the text; its metadata has a title.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from attnpred.errors import ConfigError
from attnpred.files import write_bytes
from attnpred.reading import require_regular
from attnpred.report.attention_figure import _bright
from attnpred.report.heat import image_chart
from attnpred.report.svg import Picture

NAMES = ("true", "predicted", "selected")
MOST = 600
"""Steps and blocks of a picture; more are pooled by their maximum."""


@dataclass(frozen=True, slots=True)
class HeadAttention:
    """One head over the steps: true and predicted fp32 [T, N], selected bool [T, N]."""

    title: str
    true: Tensor
    predicted: Tensor
    selected: Tensor


def save_attention(head: HeadAttention, path: Path) -> None:
    """Write the file, all or nothing. Raises `OutputError`."""
    tensors = {"true": head.true.float(), "predicted": head.predicted.float(), "selected": head.selected.bool()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, {"title": head.title}))


def load_attention(path: Path) -> HeadAttention:
    """Read a file. Raises `ConfigError`."""
    expected = "a safetensors file that `attnpred demo --attention` wrote"
    require_regular(path, expected)
    try:
        with safe_open(path, framework="pt") as file:
            missing = [name for name in NAMES if name not in file.keys()]  # noqa: SIM118 (it is no dictionary)
            if missing:
                raise ConfigError(f"got {path} without {missing[0]!r}, expected {expected}")
            found = {name: file.get_tensor(name) for name in NAMES}
            title = (file.metadata() or {}).get("title", "one head")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"got {path} ({error}), expected {expected}") from None
    shapes = {tuple(tensor.shape) for tensor in found.values()}
    if len(shapes) > 1 or len(*shapes) != 2 or 0 in next(iter(shapes)):
        raise ConfigError(f"got {path} with shapes {sorted(shapes)}, expected one shape [steps, blocks] of all three")
    if not all(bool(found[name].float().isfinite().all()) for name in NAMES):
        raise ConfigError(f"got {path} with values that are not finite, expected {expected}")
    return HeadAttention(title, found["true"].float(), found["predicted"].float(), found["selected"].bool())


def attention_pictures(head: HeadAttention, name: str = "attention") -> list[Picture]:
    """Return three pictures: the true attention, the forecast, the blocks attended; steps across, blocks up."""
    forecast = (head.predicted - head.predicted.median()).clamp_min(0)
    top = head.true.argmax(-1, keepdim=True)
    hit = float(head.selected.gather(1, top).float().mean())
    labels = ("decode steps", "blocks of the text")
    said = (
        ("true attention", "The largest probability in each block, its square root drawn.", _shares(head.true), ("0", "high")),
        ("forecast one token ahead", "From past attention alone, above its median; square root.", _shares(forecast), ("0", "high")),
        ("blocks attended", f"Sinks, forecast and recent window. In {hit:.1%} of the {len(top)} steps the block with the most true "
         "attention was among them.", head.selected.float(), ("left out", "attended")),
    )  # fmt: skip
    return [
        image_chart(f"{name}{i}", f"{head.title}: {what}", words, _small(cells).T.tolist(), labels, ends)
        for i, (what, words, cells, ends) in enumerate(said)
    ]


def _shares(values: Tensor) -> Tensor:
    return (values / _bright(values)).clamp(0, 1).sqrt()


def _small(cells: Tensor) -> Tensor:
    size = [min(MOST, length) for length in cells.shape]
    return adaptive_max_pool2d(cells[None], size)[0] if size != list(cells.shape) else cells
