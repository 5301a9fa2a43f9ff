"""Attention over selected blocks and the scoring of digests, as pure functions of tensors.

`reference` is slow, in fp32, and the definition of correct; every other backend has the same function with the same
signature and is tested against it. To add a backend: one file here, one line in one of the tables below.

`sparse_decode` and `dense_decode` are chosen for every call (`attnpred.kernels.decoding`). On a GPU, Triton's kernels are
used where it is installed; they are not in the tables, because those are tested on tensors of the CPU.
`digest_shares`, `weigh`, `remember`, `choose` and `add_rest` are those in use, `DIGEST` is their backend: chosen once, by
whether numba is installed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from attnpred.kernels import digest, reference, rest, stream, torch
from attnpred.kernels.decoding import HAS_TRITON, dense_decode_numba, dense_decode_torch
from attnpred.kernels.decoding import dense_decode as dense_decode
from attnpred.kernels.decoding import sparse_decode as sparse_decode


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


def triton_sparse_decode(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.sparse_decode` on a GPU, compiled by Triton at first use (extra `gpu`)."""
    from attnpred.kernels import triton_decode

    return triton_decode.sparse_decode(*arguments, **named)


def _by_device(name: str, other: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function `name` of Triton for tensors on a GPU, else `other`."""

    def call(*arguments: Any) -> Any:
        if arguments[0].is_cuda and HAS_TRITON:
            from attnpred.kernels import triton_select

            return getattr(triton_select, name)(*arguments)
        return other(*arguments)

    return call


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
digest_shares = _by_device("digest_shares", DIGEST_BACKENDS[DIGEST])


def has_native_selection(tensor: Tensor) -> bool:
    """True where `numba_digest` does a whole selection in one call for tensors like this."""
    return DIGEST == "numba" and tensor.device.type == "cpu"


STREAM = ("weigh", "remember", "choose")
STREAM_BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch": {name: getattr(stream, name) for name in STREAM},
    "numba": {name: _numba_stream(name) for name in STREAM},
}
weigh, remember = (_by_device(name, STREAM_BACKENDS[DIGEST][name]) for name in ("weigh", "remember"))
choose = STREAM_BACKENDS[DIGEST]["choose"]


def numba_add_rest(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`rest.add_rest` in one call, compiled by numba at first use (extra `fast`)."""
    from attnpred.kernels import numba_rest  # numba is loaded when it is used, not before

    return numba_rest.add_rest_numba(*arguments)


REST_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": rest.add_rest_reference,
    "torch": rest.add_rest,
    "numba": numba_add_rest,
}
add_rest = REST_BACKENDS[DIGEST]
