"""Attention over selected blocks, as pure functions of tensors.

`reference` is slow, in fp32, and the definition of correct; every other backend has the same function with the same
signature and is tested against it. To add a backend: one file here, one line in `BACKENDS`.
"""

from types import ModuleType

from attnpred.kernels import reference, torch

BACKENDS: dict[str, ModuleType] = {"reference": reference, "torch": torch}
