"""The weights that were packed, in a file meanwhile instead of in memory: `attach(model, weights="int8", originals="disk")`.

A packed model reads its weights in few bits, but has to give them back as they were, and whoever looks at a parameter is to
find its numbers. So they are written to a file, and mapped where they lay: what nobody looks at is in no memory. The file
has no name any more once it is mapped, so it ends with its last user, however that ends. A weight that is also something
else, the embedding above all, stays in memory.
"""

import contextlib
import ctypes
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from attnpred.errors import ConfigError, StoreError
from attnpred.store.scratch import BEGIN, IS_SUPPORTED, Scratch, absolute

PLACES = (None, "disk")
"""Where originals may lie: in memory, or in a file."""
_ALIGNED = 64


@final
class Originals:
    """Weights of layers that lie in a file, until `restore`."""

    def __init__(self) -> None:
        self._away: list[nn.Parameter] = []

    @property
    def bytes(self) -> int:
        """Bytes that lie in the file and not in memory."""
        return sum(weight.nbytes for weight in self._away)

    def put_away(self, model: nn.Module, layers: Iterable[nn.Linear], folder: Path | None = None) -> None:
        """Map the weights of `layers`, parts of `model`, from a file in `folder` (None: of the user's cache folder).

        Raises `StoreError`, and then all is as before.
        """
        uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        every: list[Any] = [layer.weight for layer in layers]
        weights = [weight for weight in every if uses[id(weight)] == 1 and weight.is_contiguous()]
        scratch, places, end = Scratch(absolute(folder)), list[int](), BEGIN
        try:
            scratch.open()
            assert scratch.path is not None
            with scratch.path.open("r+b") as file:
                for weight in weights:
                    file.seek(end)
                    file.write(_bytes_of(weight.detach()))
                    places.append(end)
                    end += -(-weight.nbytes // _ALIGNED) * _ALIGNED
                file.truncate(end)
            stored: Any = torch.UntypedStorage.from_file(str(scratch.path), shared=False, nbytes=end)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise StoreError(
                f"got {why} for a file of {end} bytes in {scratch.folder}, expected room for the weights: leave originals out"
            ) from error
        finally:
            scratch.close()
        for weight, place in zip(weights, places, strict=True):
            own = torch.empty(0, dtype=weight.dtype, device="cpu")
            weight.data = own.set_(stored, place // weight.element_size(), weight.shape, weight.stride())
            self._away.append(weight)
        _give_back()

    def restore(self) -> None:
        """Have all of them in memory again; a second call does nothing."""
        for weight in self._away:
            weight.data = weight.data.clone()
        self._away = []


def check_place(originals: str | None, weights: str | None) -> None:
    """Raise `ConfigError` if originals cannot lie there, with `weights` as `attach` has them."""
    if originals not in PLACES:
        raise ConfigError(f"got originals={originals!r}, expected 'disk', or None for memory")
    if originals is not None and (weights in (None, "float")):
        raise ConfigError(
            f"got originals={originals!r} with weights={weights!r}, which reads the originals, expected int8 or int4: leave it out"
        )
    if originals is not None and not (IS_SUPPORTED and os.name == "posix"):
        raise ConfigError(f"got originals={originals!r}, expected None on this platform: leave it out")


def _bytes_of(weight: Tensor) -> Any:
    return weight.reshape(-1).view(torch.uint8).numpy()


def _give_back() -> None:
    """Have the C library give memory that is free to the system; glibc keeps what lay in pieces below 32 MiB."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such library, or no such function
        ctypes.CDLL(None).malloc_trim(0)
