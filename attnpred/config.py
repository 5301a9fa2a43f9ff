"""`CacheConfig`: every setting of a compressed cache, frozen and validated when made.

This is the one place for a setting: its name, its default, which is the default of every command too, and the words that
explain it. Commands make their options from the fields (`attnpred.cli.options`), so a setting that is added here is an
option everywhere.

Defaults are those that the evidence was measured with: blocks that suit the policy, 16 sink and 32 recent tokens, 64 history
rows, a budget of 1024 tokens, and no dense layer, so that the compression that is asked for is the one that is read
(docs/LOG.md, 2026-11-28). Published for AttentionPredictor (arXiv 2502.04077) are 64 sinks, 64 recent tokens and the
first two layers dense. How often a history is calibrated is left to the policy: the published one takes a dense row
every fifth step, digests need none (docs/predictor.md).
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from attnpred import checks
from attnpred.errors import ConfigError

OFFLOADS = (None, "cpu", "disk")
OFFLOAD_DTYPES = (None, "int8", "fp8")
USUAL_BLOCK = 16
"""Tokens of a block that most policies were published with, and that fetching pays for."""
MOST_WEIGHT = 1_000_000
"""Of a layer's or a head's budget, and for staying where it was (hysteresis)."""
LONGEST_WAIT = 1_000_000
"""Seconds for a block."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Settings of a compressed cache. Lengths are in tokens unless the name says otherwise."""

    budget: int | float = field(
        default=1024,
        metadata={
            "about": "Tokens attended per kv head and layer, sinks and recent window included, rounded down to whole blocks; or a share of "
            "the context up to 1, which is never less than what is always attended and one block."
        },
    )
    block_size: int = field(
        default=0,
        metadata={
            "about": "Tokens that are selected and read together; 0: what suits the policy, which is 16 for most and wherever blocks are "
            "fetched (offload), and 4 for predicted."
        },
    )
    num_sink_tokens: int = field(default=16, metadata={"about": "First tokens, always attended; whole blocks."})
    recent_window: int = field(
        default=32,
        metadata={"about": "Last tokens, always attended; whole blocks, so up to one block more is attended."},
    )
    history: int = field(default=64, metadata={"about": "Rows of past attention that a policy may look at."})
    calibration_interval: int | None = field(
        default=None,
        metadata={
            "about": "A dense row for the memory every this many decode steps, which reads all keys; 0: never; left out: what the policy "
            "was made for."
        },
    )
    selection_interval: int = field(
        default=1,
        metadata={
            "about": "Blocks are chosen anew every this many decode steps. The steps between attend to the same ones and to what is recent "
            "then; they cost no selection, and their attention is not remembered."
        },
    )
    dense_layers: int | tuple[int, ...] = field(
        default=0, metadata={"about": "How many of the first layers stay dense, or which layers do, by number: 0,1,13."}
    )
    late_share: float | None = field(
        default=None,
        metadata={
            "about": "How much of a selection, 0 to 1, may be blocks that the forecast missed and the query of the step asks for: they are "
            "fetched late. 0 keeps to the forecast; left out: all with offload; without it nothing is late, and a policy that "
            "can correct chooses all blocks with the query. For policies that correct."
        },
    )
    hysteresis: float = field(
        default=0.0,
        metadata={
            "about": "Added to the scores of the blocks attended last, so that fewer blocks change (units of the policy's score)."
        },
    )
    per_query_head: bool = field(
        default=False,
        metadata={
            "about": "Select for each query head instead of once per kv head (as the authors' code does; reads more)."
        },
    )
    union: bool = field(
        default=False,
        metadata={
            "about": "Each query head scores, and a kv head attends to what its query heads want most, one block each in turn."
        },
    )
    layer_budgets: tuple[float, ...] | None = field(
        default=None,
        metadata={
            "about": "A weight for each layer of the model, by which its budget is multiplied; left out: the same for all."
        },
    )
    head_budgets: str | tuple[float, ...] | None = field(
        default=None,
        metadata={
            "about": "A weight for each kv head, or adaptive: the best scores of all heads of a layer together (Ada-KV); left out: the same "
            "for all. What a layer chooses in all stays the same."
        },
    )
    estimate_rest: bool | None = field(
        default=None,
        metadata={
            "about": "Add what a step leaves out to its output as an estimate, by a vector for each query head that the prompt's last rows "
            "teach; left out: for policies that were made for it (predicted)."
        },
    )
    strict: bool = field(default=False, metadata={"about": "Fail where a decode step falls back to dense attention."})
    measure_recovery: bool = field(
        default=False,
        metadata={"about": "Also compute the true attention of every step, for the counters; slow, for evaluation."},
    )
    dense_when_fits: bool = field(
        default=True,
        metadata={"about": "Take the dense path while the context fits the budget; off only to test the sparse path."},
    )
    offload: str | None = field(
        default=None,
        metadata={
            "about": "Where the blocks lie that the budget does not hold: none (in fast memory with the others), cpu (memory of the host) "
            "or disk (a file). The tokens are the same."
        },
    )
    offload_dir: str | Path | None = field(
        default=None, metadata={"about": "Folder of that file; left out: a folder of your own cache directory."}
    )
    offload_dtype: str | None = field(
        default=None,
        metadata={
            "about": "Numbers of the blocks there: int8 or fp8, about half of 16 bits (lossy); left out: as they are."
        },
    )
    fast_limit: int | None = field(default=None, metadata={"about": "Most bytes of fast memory; left out: no limit."})
    host_limit: int | None = field(
        default=None,
        metadata={
            "about": "Most bytes of host memory; with offload to disk, host memory is filled first; left out: no limit."
        },
    )
    disk_limit: int | None = field(default=None, metadata={"about": "Most bytes of disk; left out: no limit."})
    fetch_timeout: float = field(
        default=60.0, metadata={"about": "Seconds after which a block that has not arrived is an error."}
    )
    layer_groups: str | Path | None = field(
        default=None,
        metadata={
            "about": "File of `attnpred analyse-layers`: layers of a group share the keys of distant tokens (PoD); left out: no sharing. "
            "The published windows are the two that follow."
        },
    )
    own_sinks: int = field(
        default=16,
        metadata={
            "about": "First tokens for which every layer keeps keys of its own, with layer groups. A policy that selects always attends to "
            "them: its sinks become at least these, in whole blocks."
        },
    )
    own_recent: int = field(
        default=4080, metadata={"about": "Last tokens for which every layer keeps keys of its own; likewise."}
    )
    distant_gate: float | None = field(
        default=None,
        metadata={
            "about": "tau: a layer that shares leaves distant tokens out where the near ones are estimated to have at least this share of "
            "its attention (published: 0.7); left out: never. For policies that attend to everything."
        },
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("block_size", 0),
            ("num_sink_tokens", 0),
            ("recent_window", 1),
            ("history", 1),
            ("calibration_interval", 0),
            ("selection_interval", 1),
            ("own_sinks", 0),
            ("own_recent", 1),
        ):
            if name != "calibration_interval" or self.calibration_interval is not None:
                checks.whole(name, getattr(self, name), least, checks.TOKENS)
        for one in fields(self):
            if one.type is bool:
                value = getattr(self, one.name)
                if type(value) is not bool:
                    raise ConfigError(f"got {one.name}={checks.shown(value)}, expected True or False")
        if type(self.estimate_rest) not in (bool, type(None)):
            raise ConfigError(f"got estimate_rest={checks.shown(self.estimate_rest)}, expected True, False or None")
        for name in ("num_sink_tokens", "recent_window"):
            if self.block_size and getattr(self, name) % self.block_size:
                raise ConfigError(
                    f"got {name}={getattr(self, name)}, expected a multiple of block_size={self.block_size}: change one of the two"
                )
        self._check_budget()
        self._check_dense_layers()
        late, stays = self.late_share, self.hysteresis
        if late is not None and (not checks.is_finite(late) or not 0 <= late <= 1):
            raise ConfigError(f"got late_share={checks.shown(late)}, expected a share from 0 to 1, or None")
        if not checks.is_finite(stays) or not 0 <= stays <= MOST_WEIGHT:
            raise ConfigError(
                f"got hysteresis={checks.shown(stays)}, expected a number of at least 0, up to {MOST_WEIGHT:,}"
            )

        self._check_offload()
        self._check_sharing()
        self._check_shares()

    def _check_shares(self) -> None:
        for name in ("layer_budgets", "head_budgets"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON gives it back
                object.__setattr__(self, name, value := tuple(value))
            if value is None or (value == "adaptive" and name == "head_budgets"):
                continue
            numbers = value if isinstance(value, tuple) else ()
            if not numbers or not all(checks.is_finite(x) and 0 < x <= MOST_WEIGHT for x in numbers):
                raise ConfigError(
                    f"got {name}={checks.shown(value)}, expected numbers above 0 and up to {MOST_WEIGHT:,}, one for each"
                )
        if self.head_budgets is not None and (self.offload is not None or self.hysteresis):
            other = f"offload={self.offload!r}" if self.offload is not None else f"hysteresis={self.hysteresis}"
            raise ConfigError(f"got head_budgets with {other}, expected one of the two")
        if self.head_budgets is not None and self.late_share is not None:
            raise ConfigError("got head_budgets with late_share, expected one of the two")
        if self.union and self.per_query_head:
            raise ConfigError("got union with per_query_head, expected one of the two")

    def for_layer(self, layer: int) -> "CacheConfig":
        """Return the settings of layer `layer`, with the budget that is its own. Raises `ConfigError`."""
        if self.layer_budgets is None:
            return self
        if layer >= len(self.layer_budgets):
            raise ConfigError(
                f"got {len(self.layer_budgets)} layer_budgets for a model with a layer {layer}, expected one for each layer"
            )
        wanted = self.budget * self.layer_budgets[layer]
        own = min(1.0, wanted) if isinstance(self.budget, float) else max(self.smallest_budget, round(wanted))
        return replace(self, budget=own, layer_budgets=None)

    def _check_sharing(self) -> None:
        gate = self.distant_gate
        if gate is not None and (not checks.is_finite(gate) or not 0 < gate <= 1):
            raise ConfigError(f"got distant_gate={checks.shown(gate)}, expected a share above 0 and up to 1, or None")
        if gate is not None and self.layer_groups is None:
            raise ConfigError(f"got distant_gate={gate!r} without layer_groups, expected a file of analyse-layers")
        if self.layer_groups is not None and self.offload is not None:
            raise ConfigError(f"got layer_groups with offload={self.offload!r}, expected one of the two")

    def _check_dense_layers(self) -> None:
        layers = self.dense_layers
        given = layers if isinstance(layers, tuple | list) else (layers,)
        if any(type(x) is not int or not 0 <= x <= checks.WHOLE for x in given):
            raise ConfigError(
                f"got dense_layers={checks.shown(layers)}, expected a whole number of at least 0, or numbers of layers"
            )
        if isinstance(layers, list):  # as JSON gives it back
            object.__setattr__(self, "dense_layers", tuple(layers))

    def is_dense_layer(self, index: int) -> bool:
        """True where layer `index` stays dense."""
        layers = self.dense_layers
        return index < layers if isinstance(layers, int) else index in layers

    def _check_offload(self) -> None:
        for name, known in (("offload", OFFLOADS), ("offload_dtype", OFFLOAD_DTYPES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"got {name}={getattr(self, name)!r}, expected one of {', '.join(map(repr, known))}")
        for name in ("offload_dir", "offload_dtype", "host_limit", "disk_limit"):
            if getattr(self, name) is not None and self.offload is None:
                raise ConfigError(
                    f"got {name}={getattr(self, name)!r} without offload, expected offload='cpu' or 'disk'"
                )
        for name in ("fast_limit", "host_limit", "disk_limit"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= checks.BYTES):
                raise ConfigError(f"got {name}={checks.shown(value)}, expected a number of bytes, or None for no limit")
        seconds = self.fetch_timeout
        if not checks.is_finite(seconds) or not 0 < seconds <= LONGEST_WAIT:
            raise ConfigError(
                f"got fetch_timeout={checks.shown(seconds)}, expected seconds above 0 and up to {LONGEST_WAIT:,}"
            )

    def _check_budget(self) -> None:
        budget = self.budget
        if type(budget) not in (int, float) or not 0 < budget <= checks.WHOLE:  # false for NaN too
            raise ConfigError(
                f"got budget={checks.shown(budget)}, expected a number of tokens, or a share of the context above 0 and up to 1"
            )
        if isinstance(budget, float) and budget > 1:
            raise ConfigError(
                f"got budget={budget!r}, expected a share of at most 1.0, or whole tokens: write {budget:.0f} for tokens"
            )
        if isinstance(budget, int) and budget < self.smallest_budget:
            raise ConfigError(
                f"got budget={budget}, expected at least {self.smallest_budget} ({self.num_sink_tokens} sink + {self.recent_window} "
                f"recent tokens + 2 blocks of {self.block_size or USUAL_BLOCK}): raise it, or lower num_sink_tokens or recent_window"
            )

    @property
    def smallest_budget(self) -> int:
        """Tokens of sinks, recent window, the partly filled block, and one block to choose."""
        return self.num_sink_tokens + self.recent_window + 2 * (self.block_size or USUAL_BLOCK)

    def budget_blocks(self, tokens: int) -> int:
        """Return how many blocks of each head may be attended in a context of `tokens`: all, if the budget holds it."""
        budget = self.budget if isinstance(self.budget, int) else max(int(self.budget * tokens), self.smallest_budget)
        return (budget + self.block_size - 1 if budget >= tokens else budget) // self.block_size


CacheConfig.__doc__ = f"{CacheConfig.__doc__}\n\n" + "\n".join(
    f"{one.name}: {one.metadata['about']}" for one in fields(CacheConfig)
)
