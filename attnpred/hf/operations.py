"""`Operations`: what is done to a cache beside adding tokens, by `generate` above all; every part of it follows.

Tokens are cut off (`crop`), rows are exchanged, chosen and repeated (beams), and a cache that a failed step has left with
more tokens in one layer than in another is told apart from a whole one.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from attnpred.config import CacheConfig
from attnpred.decode import LayerDecoder
from attnpred.errors import ConfigError, StoreError
from attnpred.hf.layer import holds_tokens
from attnpred.hf.modes import in_ordinary_mode
from attnpred.sharing import Sharing


class Operations(Cache):
    """The base of `TieredCache`, which makes the parts that are named here."""

    settings: CacheConfig
    sharing: Sharing | None
    decoders: dict[int, LayerDecoder]
    tokens: Tensor | None
    saved_tokens: int

    @abstractmethod
    def require_usable(self) -> None:
        """Raise `StoreError` where the cache must not be used any more."""

    def _forget(self) -> None:
        self.tokens, self.saved_tokens = None, 0

    @in_ordinary_mode
    def reset(self) -> None:
        self.require_usable()
        super().reset()
        self._forget()
        for decoder in self.decoders.values():
            decoder.clear()

    @in_ordinary_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens, 0 or less; of a torn cache at least what not all layers have."""
        self.require_usable()
        # Some versions of `generate` bring a tensor; lengths are plain numbers everywhere below.
        removed = int(tokens_to_remove)
        if removed > 0:
            raise ConfigError(f"got crop({removed}), expected 0 or less: -n removes the last n tokens")
        lengths = [layer.get_seq_length() for layer in self._holders()]
        wanted = max(0, min([self.get_seq_length() + removed, *lengths]))
        for decoder in self.decoders.values():  # before anything is changed
            decoder.left.require(wanted, self.settings.block_size)
        if self.sharing is not None:
            self.sharing.check_crop(wanted)
        if len(set(lengths)) > 1:
            for layer, length in zip(self._holders(), lengths, strict=True):
                layer.crop(wanted - length)
        else:
            super().crop(removed)
        length = self.get_seq_length()
        self.tokens = None if self.tokens is None else self.tokens[:, :length]
        self.saved_tokens = min(self.saved_tokens, length)
        for decoder in self.decoders.values():
            decoder.crop(length) if length else decoder.clear()

    def _holders(self) -> list[DynamicLayer]:
        layers: list[Any] = [layer for layer in self.layers if holds_tokens(layer)]
        return layers

    def require_whole(self) -> None:
        """Raise `StoreError` unless all layers hold the same tokens: an exception in a step leaves some with more."""
        lengths = [layer.get_seq_length() for layer in self._holders()]
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        if shortest < longest:
            raise StoreError(
                f"got a cache with {shortest} tokens in one layer and {longest} in another, expected as many in all: a step "
                f"ended halfway; crop({shortest - self.get_seq_length()}) takes back what it did, or make a new cache"
            )

    @in_ordinary_mode
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.require_usable()
        super().reorder_cache(beam_idx)
        self.tokens = None if self.tokens is None else self.tokens[beam_idx.cpu()]
        for decoder in self.decoders.values():
            decoder.select(beam_idx)

    @in_ordinary_mode
    def batch_select_indices(self, indices: Tensor) -> None:
        self.require_usable()
        super().batch_select_indices(indices)
        self.tokens = None if self.tokens is None else self.tokens[indices.cpu()]
        for decoder in self.decoders.values():
            decoder.select(indices)

    @in_ordinary_mode
    def batch_repeat_interleave(self, repeats: int) -> None:
        self.require_usable()
        super().batch_repeat_interleave(repeats)
        self.tokens = None if self.tokens is None else self.tokens.repeat_interleave(repeats, 0)
        for decoder in self.decoders.values():
            decoder.repeat(repeats)
