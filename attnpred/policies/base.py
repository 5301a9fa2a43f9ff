"""What a policy is: it scores blocks. Everything else (top-k, sinks, recent window, budget, state) belongs to others.

A policy is a frozen dataclass of its hyper-parameters and any trained weights; it holds no state of a sequence. What it
remembers of a layer is a `Memory` that it makes, that the decode step owns and feeds, and that it is shown in a `View`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from attnpred.config import USUAL_BLOCK, CacheConfig
from attnpred.policies.select import Zone
from attnpred.predictor.memory import Memory, NoMemory

M = TypeVar("M", bound=Memory)

KINDS = ("reference", "eviction", "retrieval", "reuse", "learned")
"""Reference: what others are held against. Eviction: what is dropped never comes back. Retrieval: scores of everything, at
every step. Reuse: a choice that serves several steps or layers. Learned: weights trained, or found at the prompt."""


@dataclass(frozen=True, slots=True)
class View(Generic[M]):
    """What a policy may look at.

    layer: index in the model. is_current: the query that the memory has looked at last is the one that will attend;
    otherwise it is the one before. block_mass: computes the step's true attention per block, [B, Hs, N]: evaluation only.
    block_logits: of the blocks [B, Hq, S], ids of full or open blocks, the logarithm of the summed exponentials of their
    logits, [B, Hq, S], for the query of this step: reads their keys. first_block: the block in which each row begins, [B],
    where rows are padded on the left.
    """

    memory: M
    zone: Zone
    layer: int = 0
    is_current: bool = False
    block_mass: Callable[[], Tensor] | None = None
    block_logits: Callable[[Tensor], Tensor] | None = None
    first_block: Tensor | None = None


class Policy(ABC, Generic[M]):
    """Interface; concrete policies are final."""

    kind: ClassVar[str] = "reference"
    """One of `KINDS`."""
    cost: ClassVar[str] = "nothing"
    """What a selection costs, in words, for one kv head: N blocks of P tokens, D dimensions, G queries."""
    source: ClassVar[str] = "attnpred"
    """Where it was published."""
    needs_query: ClassVar[bool] = False
    """Every selection is made inside the step, from its own query, so nothing can be prefetched."""
    corrects: ClassVar[bool] = False
    """A forecast made before the step can be corrected inside it, from its own query."""
    keeps: ClassVar[bool] = False
    """What it corrects depends on its forecast, so there is one even where nothing is fetched."""
    calibration: ClassVar[int] = 0
    """Every how many steps it wants a true row, unless the settings say otherwise; 0 is never."""
    leaves_out: ClassVar[bool] = False
    """A block whose score is -inf is not attended to, even where the budget has room for it."""
    is_dense: ClassVar[bool] = False
    """Every step attends to everything."""
    granularity: ClassVar[int] = USUAL_BLOCK
    """Tokens of a block that it chooses best by, unless the settings say otherwise."""
    estimates_rest: ClassVar[bool] = False
    """What it leaves out is estimated, unless the settings say otherwise."""
    evicts: ClassVar[bool] = False
    """What is not chosen is dropped for good: every choice is among what the last one has left."""
    keeps_decoded: ClassVar[bool] = False
    """With `evicts`: it chooses once, after a prompt, and keeps every token after that, beyond the budget."""
    predictor_kind: ClassVar[str] = ""
    """The kind of predictor (`PredictorConfig.kind`) that it is made of; empty: it is made of none."""
    reads_tokens: ClassVar[bool] = False
    """Its memory wants the token ids (`Memory.read`), and `for_tokenizer` makes one for a model's tokenizer."""

    def memory(self, config: CacheConfig, layer: int) -> Memory:
        """Return an empty memory for layer `layer` of the model."""
        return NoMemory()

    def settle(self, config: CacheConfig) -> CacheConfig:
        """Return `config` with the block size that suits the policy, where it says none. Raises `ConfigError`."""
        if config.block_size:
            return config
        return replace(config, block_size=self.granularity if config.offload is None else USUAL_BLOCK)

    def leader(self, layer: int, layers: Sequence[int]) -> int:
        """Return the layer that chooses for `layer`: itself, or an earlier one, whose memory its own then follows.

        layers: those that can choose, in order.
        """
        return layer

    def choose(self, view: View[M]) -> Tensor | None:
        """Return the selection that its scores lead to, where it can be had in one go; None: score, then choose."""
        return None

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> "Policy[Any]":
        """Return the policy for a model with this tokenizer (of transformers)."""
        return cls()

    @classmethod
    def untrained(cls, block_size: int, group: int, dim: int) -> "Policy[Any]":
        """Return the policy with weights that nobody trained, where it has any, for any model of these sizes, P, G and D.

        So one can ask what it takes, and test what does not depend on weights.
        """
        return cls()

    @abstractmethod
    def score(self, view: View[M]) -> Tensor:
        """Return scores [B, Hs, N], higher is kept; only blocks between sinks and recent window matter."""


def placed(scores: Tensor, zone: Zone) -> Tensor:
    """Return [B, Hs, N] from scores of the blocks between sinks and recent window."""
    return torch.nn.functional.pad(scores, (zone.sinks, zone.blocks - zone.first_recent))


def widened(row: Tensor, zone: Zone) -> Tensor:
    """Return [B, Hs, N] from a row that may know fewer blocks."""
    return torch.nn.functional.pad(row, (0, max(0, zone.blocks - row.shape[-1])))[..., : zone.blocks]


def newest_first(scores: Tensor, count: int) -> Tensor:
    """Return scores [B, Hs, N] with which the newest `count` blocks come before all others, the newest of all first."""
    blocks = scores.shape[-1]
    first = max(0, blocks - count)
    above = scores.amax(-1, keepdim=True) + torch.arange(1, blocks - first + 1, device=scores.device)
    return torch.cat((scores[..., :first], above), -1)
