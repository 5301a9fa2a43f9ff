"""`Growing`: a tensor [B, H, L, D] that tokens are added to at the end, with room behind them; growth is by eighths.

A fork shares the memory until one of the two appends, which then makes a copy of its own. Memory past the length is finite.
"""

from typing import Any, final

import torch
from torch import Tensor

SPARE = 64


@final
class Growing:
    """Successive tokens; `start` is the position of the first of them that is still there.

    spare: tokens that there is room for behind the last, at least, when memory is taken.
    """

    def __init__(self, spare: int = SPARE) -> None:
        self.spare = spare
        self.clear()

    def clear(self) -> None:
        """Forget everything and release the memory."""
        self.start = self.length = 0
        self._held = torch.empty(0, dtype=torch.float32, device="cpu")
        self._is_shared = False

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.start + self.length

    def view(self) -> Tensor:
        """Return what is there, [B, H, length, D]."""
        return self._held[:, :, : self.length] if self._held.ndim == 4 else self._held

    @property
    def batch(self) -> int:
        return self._held.shape[0] if self._held.ndim == 4 else 0

    @property
    def device(self) -> torch.device:
        return self._held.device

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head."""
        return self._held.shape[-1] * self._held.element_size()

    def of(self, heads: slice) -> Tensor:
        """Return what is there of these heads, [B, H', length, D]."""
        return self.view()[:, heads]

    def gather(self, tokens: Tensor, heads: slice) -> Tensor:
        """Return the `tokens` [B, H', T], places from `start` on, of these heads: [B, H', T, D], H' = G times as many."""
        return gathered(self.view()[:, heads], tokens)

    def left(self, blocks: int) -> Tensor | None:
        """Return None: nothing was given back (`Evictable`)."""
        return None

    def append(self, new: Tensor) -> None:
        """Add tokens, [B, H, T, D]."""
        if self._held.ndim != 4:
            self._held = new.new_zeros(*new.shape[:2], 0, new.shape[3])
        needed = self.length + new.shape[2]
        if needed > self._held.shape[2] or self._is_shared:
            room = needed + max(self.spare, needed // 8 if self.length and self.spare else 0)
            self._move(0, room if needed > self._held.shape[2] else self._held.shape[2])
        self._held[:, :, self.length : needed] = new
        self.length = needed

    def drop(self, start: int, room: int) -> None:
        """Forget the tokens before position `start`, and keep memory for `room` tokens, or those that are left."""
        if start > self.start:
            cut = min(start - self.start, self.length)
            self._move(cut, max(room, self.length - cut))
            self.start, self.length = self.start + cut, self.length - cut

    def _move(self, cut: int, room: int) -> None:
        """Take memory for `room` tokens, and move what follows the first `cut` of them there."""
        old = self._held[:, :, cut : self.length]
        self._held = old.new_zeros(*old.shape[:2], room, old.shape[3])
        self._held[:, :, : old.shape[2]] = old
        self._is_shared = False

    def crop(self, stop: int) -> None:
        """Keep the tokens before position `stop`, which is where the next one will be if there are fewer."""
        self.length = max(0, min(self.length, stop - self.start))
        self.start = min(self.start, stop)

    def select(self, rows: Tensor) -> None:
        """Make the batch `rows` of the old one."""
        self._held, self._is_shared = self._held[rows.to(self._held.device)].contiguous(), False

    def repeat(self, times: int) -> None:
        """Repeat each batch row `times` times, side by side."""
        self._held, self._is_shared = self._held.repeat_interleave(times, 0), False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Growing":
        other = Growing(self.spare)
        other.start, other.length, other._held = self.start, self.length, self._held
        self._is_shared = other._is_shared = True
        return other

    def bytes(self) -> int:
        """Bytes that are taken, those of the room included."""
        return self._held.numel() * self._held.element_size()


def gathered(stored: Tensor, places: Tensor) -> Tensor:
    """Return [B, H', T, D] from stored [B, H, L, D]: the `places` [B, H', T], of each head for each of its query heads."""
    group = places.shape[1] // stored.shape[1]
    shown = stored.repeat_interleave(group, 1) if group > 1 else stored
    return shown.gather(2, places[..., None].expand(-1, -1, -1, stored.shape[3]))
