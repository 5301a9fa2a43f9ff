"""Attention over selected blocks and the scoring of digests, as pure functions of tensors.

`reference` is slow, in fp32, and the definition of correct; every other backend has the same function with the same
signature and is tested against it. To add a backend: one file here, one line in one of the tables below.

`sparse_decode` and `dense_decode` are chosen for every call (`attnpred.kernels.decoding`).
`digest_shares`, `weigh`, `remember` and `choose` are those in use, `DIGEST` is their backend: chosen once, by whether numba
is installed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor

from attnpred.kernels import digest, reference, stream, torch
from attnpred.kernels.decoding import dense_decode as dense_decode
from attnpred.kernels.decoding import dense_decode_numba, dense_decode_torch
from attnpred.kernels.decoding import sparse_decode as sparse_decode

BACKENDS: dict[str, ModuleType] = {"reference": reference, "torch": torch}


def numba_sparse_decode(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.sparse_decode` in one pass over the blocks, compiled by numba at first use (extra `fast`)."""
    from attnpred.kernels import numba_decode  # numba is loaded when it is used, not before

    return numba_decode.sparse_decode(*arguments, **named)


DECODE_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "reference": reference.sparse_decode,
    "torch": torch.sparse_decode,
    "numba": numba_sparse_decode,
}
DENSE_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "torch": dense_decode_torch,
    "numba": dense_decode_numba,
}


def numba_digest_shares(query: Tensor, codes: Tensor, vectors: int) -> Tensor:
    """One pass over the codes, compiled by numba at first use (extra `fast`)."""
    from attnpred.kernels import numba_digest  # numba is loaded when it is used, not before

    return numba_digest.digest_shares(query, codes, vectors)


def _numba_stream(name: str) -> Callable[..., Any]:
    """Return the function `name` of `numba_stream`, which is loaded when it is first called."""

    def call(*arguments: Any) -> Any:
        from attnpred.kernels import numba_stream

        return getattr(numba_stream, name)(*arguments)

    return call


DIGEST_BACKENDS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "reference": digest.digest_shares_reference,
    "torch": digest.digest_shares,
    "numba": numba_digest_shares,
}
DIGEST = "numba" if find_spec("numba") else "torch"
digest_shares = DIGEST_BACKENDS[DIGEST]

STREAM = ("weigh", "remember", "choose")
STREAM_BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch": {name: getattr(stream, name) for name in STREAM},
    "numba": {name: _numba_stream(name) for name in STREAM},
}
weigh, remember, choose = (STREAM_BACKENDS[DIGEST][name] for name in STREAM)
