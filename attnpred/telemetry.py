"""What a cache really read, counted where it is read, from the shapes of the tensors that were gathered.

One `LayerCounts` per layer. Bytes count keys and values of the decode steps; a true row (for calibration, or for the
oracle) reads keys only and is counted apart, and so are the digests of the blocks, which are read in every step. Dense
decode steps are counted with their reason; only those in `FALLBACKS` are fallbacks, the others are what the settings
ask for.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

FITS = "context fits the budget"
DENSE_LAYER = "dense layer"
DENSE_POLICY = "policy is full"
SEVERAL = "several tokens in one call"
SHARED = "distant keys are shared"
NOT_ATTACHED = "model is not attached"
FALLBACKS = (NOT_ATTACHED,)

FETCHED = (
    "selected",
    "hits",
    "arrived_late",
    "fetched_late",
    "bytes_fetched",
    "bytes_wasted",
    "bytes_streamed",
    "bytes_written",
    "retries",
)


@dataclass(slots=True)
class LayerCounts:
    """Sums over the decode steps of one layer; per-head figures are per kv head.

    What a store with a slow tier counts: selected blocks (of all heads), and of them hits, which lay in fast memory when
    the step came, arrived_late, which were on their way, and fetched_late, which nobody had requested; bytes fetched for
    selections, of these wasted (requested, never attended), streamed for dense passes, written; retries of reads;
    exposed_wait: seconds that steps waited for blocks.
    Of layers that share keys: how many kv heads and tokens had distant ones, and for how many of them these were read.
    """

    steps: int = 0
    sparse_steps: int = 0
    context_tokens: int = 0
    tokens_attended: int = 0
    blocks_selected: int = 0
    bytes_read: int = 0
    calibration_bytes: int = 0
    digest_bytes: int = 0
    full_bytes: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    recovery: Tensor | float = 0.0
    best: Tensor | float = 0.0
    measured: int = 0
    late: Tensor | float = 0.0
    chosen: int = 0
    selected: int = 0
    hits: int = 0
    arrived_late: int = 0
    fetched_late: int = 0
    bytes_fetched: int = 0
    bytes_wasted: int = 0
    bytes_streamed: int = 0
    bytes_written: int = 0
    retries: int = 0
    exposed_wait: float = 0.0
    distant_asked: int = 0
    distant_kept: int = 0

    def count_sparse(self, context: int, attended: int, blocks: int, read: int, full: int) -> None:
        """Count one sparse step."""
        self.steps += 1
        self.sparse_steps += 1
        self.context_tokens += context
        self.tokens_attended += attended
        self.blocks_selected += blocks
        self.bytes_read += read
        self.full_bytes += full

    def count_dense(self, reason: str, tokens: int, context: int, full: int) -> None:
        """Count one dense call after the prompt; calls of one token are decode steps."""
        self.dense[reason] = self.dense.get(reason, 0) + 1
        if tokens == 1:
            self.steps += 1
            self.context_tokens += context
            self.tokens_attended += context
            self.bytes_read += full
            self.full_bytes += full

    def count_shared(self, context: int, attended: int, read: int, full: int, asked: int, kept: int) -> None:
        """Count one decode step of a layer that shares keys; `attended` is the mean over kv heads."""
        self.dense[SHARED] = self.dense.get(SHARED, 0) + 1
        self.steps += 1
        self.context_tokens += context
        self.tokens_attended += attended
        self.bytes_read += read
        self.full_bytes += full
        self.distant_asked += asked
        self.distant_kept += kept

    def count_recovery(self, recovery: Tensor, best: Tensor) -> None:
        """Add the attention mass inside the selection and inside the best one, [B, Hq] each."""
        self.recovery = self.recovery + recovery.mean()
        self.best = self.best + best.mean()
        self.measured += 1

    def count_late(self, chosen: Tensor, forecast: Tensor, size: int) -> None:
        """Count the blocks [B, Hs, F] that a correction added to those of the forecast, [B, Hs, F']; -1 is no block.

        size: blocks of a selection, sinks and recent window included.
        """
        missed = (chosen[..., None] != forecast[..., None, :]).all(-1) & (chosen >= 0)
        self.late = self.late + missed.sum()
        self.chosen += chosen.shape[0] * chosen.shape[1] * size

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, averages per decode step."""
        steps = max(1, self.steps)
        read = self.bytes_read + self.calibration_bytes + self.digest_bytes
        result: dict[str, Any] = {
            "steps": self.steps,
            "sparse_steps": self.sparse_steps,
            "tokens_attended": self.tokens_attended / steps,
            "context_tokens": self.context_tokens / steps,
            "blocks_selected": self.blocks_selected / max(1, self.sparse_steps),
            "bytes_read": self.bytes_read,
            "calibration_bytes": self.calibration_bytes,
            "digest_bytes": self.digest_bytes,
            "full_bytes": self.full_bytes,
            "compression": self.full_bytes / read if read else 1.0,
            "dense": dict(self.dense),
            "fallbacks": sum(self.dense.get(reason, 0) for reason in FALLBACKS),
        }
        if self.chosen:
            result["late_share"] = float(self.late) / self.chosen
        if self.selected or self.bytes_streamed or self.bytes_written:
            result |= {name: getattr(self, name) for name in FETCHED}
            result["hit_rate"] = self.hits / self.selected if self.selected else 1.0
            result["exposed_wait_ms"] = self.exposed_wait * 1e3
        if self.distant_asked:
            result["distant_skipped"] = 1 - self.distant_kept / self.distant_asked
        if self.measured:
            recovery, best = float(self.recovery) / self.measured, float(self.best) / self.measured
            result |= {"attention_recovery": recovery, "recovery_ratio": recovery / best}
        return result


SUMMED = tuple(entry.name for entry in fields(LayerCounts) if entry.name != "dense")


def total(layers: list[LayerCounts]) -> LayerCounts:
    """Add up layers (or caches); steps become layer-steps."""
    result = LayerCounts()
    for layer in layers:
        for name in SUMMED:
            setattr(result, name, getattr(result, name) + getattr(layer, name))
        for reason, count in layer.dense.items():
            result.dense[reason] = result.dense.get(reason, 0) + count
    return result


def report(counts: list[LayerCounts], indices: list[int]) -> dict[str, Any]:
    """Return per-layer counters and their sum as plain numbers."""
    layers = [{"layer": index} | count.as_dict() for index, count in zip(indices, counts, strict=True)]
    return {"layers": layers, "total": total(counts).as_dict()}
