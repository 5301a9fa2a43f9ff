"""`Left`: which blocks an evicting policy has left of one layer. What is dropped once never comes back.

    keep     the selection of the next step was made: of the blocks that exist now, it names all that stay
    limit    before the next choice: blocks that are gone cannot be chosen
    strike   after it: where fewer are left than the budget has places for, the rest is no block at all

The rule is kept here, by the decode step; that the memory is released is the store's part (`Store.release`). Blocks that
come after a decision are all there until the next one.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from attnpred.errors import StoreError


@final
class Left:
    """kept [B, Hs, K]: blocks that stay, -1 for none, of the first `decided` blocks; None: nothing was dropped."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the sequence."""
        self.kept: Tensor | None = None
        self.decided = 0

    def keep(self, selection: Tensor, blocks: int) -> None:
        """Of the first `blocks` blocks let `selection` [B, Hs, K] be all that is left; later ones are not its matter."""
        self.kept, self.decided = selection.masked_fill(selection >= blocks, -1), blocks

    def mask(self, blocks: int) -> Tensor:
        """Return what is left of the first `blocks` blocks, bool [B, Hs, blocks]; only after `keep`."""
        assert self.kept is not None
        size = max(blocks, self.decided)
        here = torch.zeros(*self.kept.shape[:2], size + 1, dtype=torch.bool, device=self.kept.device)
        here.scatter_(2, self.kept.masked_fill(self.kept < 0, size), True)  # the last column takes what -1 would write
        here[..., self.decided :] = True
        return here[..., :blocks]

    def limit(self, scores: Tensor) -> Tensor:
        """Return scores [B, Hs, N] with -inf for what is gone."""
        if self.kept is None:
            return scores
        return scores.masked_fill(~self.mask(scores.shape[2]), -torch.inf)

    def strike(self, selection: Tensor) -> Tensor:
        """Return a selection [B, Hs, K] with -1 for what is gone."""
        if self.kept is None or not selection.numel():
            return selection
        here = self.mask(int(selection.max()) + 1)
        return selection.masked_fill(~here.gather(2, selection.clamp_min(0)), -1)

    def blocks(self, count: int) -> Tensor:
        """Return all that is left of the first `count` blocks, [B, Hs, K'], -1 for none; only after `keep`."""
        assert self.kept is not None
        later = torch.arange(self.decided, count, device=self.kept.device).expand(*self.kept.shape[:2], -1)
        return torch.cat((self.kept, later), 2)

    def require(self, length: int, block_size: int) -> None:
        """Raise `StoreError` if a crop to `length` tokens would end in a block that is gone."""
        last = (length - 1) // block_size
        if self.kept is None or length <= 0 or last >= self.decided:
            return
        if not bool((self.kept == last).any(2).all()):
            raise StoreError(
                f"got a crop to {length} tokens, expected to keep the recent window: what was before it is evicted; fork the "
                "cache before what is to be cropped"
            )

    def crop(self, blocks: int) -> None:
        """Forget the blocks from `blocks` on."""
        if self.kept is not None:
            self.kept = self.kept.masked_fill(self.kept >= blocks, -1)
            self.decided = min(self.decided, blocks)

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one: an index or a boolean mask."""
        if self.kept is not None:
            self.kept = self.kept[rows.to(self.kept.device)]

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times."""
        if self.kept is not None:
            self.kept = self.kept.repeat_interleave(times, 0)

    def state(self) -> dict[str, Any]:
        """Return what is left, if anything was dropped."""
        return {} if self.kept is None else {"kept": self.kept, "decided": self.decided}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of another."""
        self.clear()
        if "kept" in state:
            self.kept, self.decided = state["kept"], state["decided"]
