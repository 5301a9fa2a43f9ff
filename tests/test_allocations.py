"""Every tensor that the library makes names its device and its type of number: none is left to torch's defaults.

`torch.set_default_device` and `torch.set_default_dtype` are the user's. A tensor that follows them lies where nothing of
the model is, or has numbers that compiled code reads as others. The rule is checked on the source.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import attnpred

PACKAGE = Path(attnpred.__file__).parent

FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
"""Functions of torch that make a tensor from no other tensor."""
MODULES = {"Conv1d", "Conv2d", "Embedding", "GRU", "LSTM", "LayerNorm", "Linear", "RMSNorm"}
"""Modules of torch.nn with weights, which take device and dtype too."""
WHOLE = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}
"""Of these, what is made of whole numbers, whatever the default dtype; `tensor` of Python's numbers says so by itself."""


def allocations(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of what `path` leaves to a default."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        given = {word.arg for word in node.keywords}
        is_ours = (owner == "torch" and name in FACTORIES) or (owner in ("nn", "torch.nn") and name in MODULES)
        wanted = {"device"} if name in WHOLE else {"device", "dtype"}
        if is_ours and not wanted <= given and None not in given:
            yield node.lineno, ast.unparse(node)


def left_to_defaults(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package).as_posix()}:{line} {text}"
        for path in sorted(package.rglob("*.py"))
        for line, text in allocations(path)
    ]


def test_nothing_is_left_to_torchs_defaults() -> None:
    assert left_to_defaults(PACKAGE) == []


def test_the_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import torch\nx = torch.zeros(3, dtype=torch.int8)\ny = torch.arange(3)\n")
    (tmp_path / "good.py").write_text("import torch\nx = torch.zeros(3, device='cpu', dtype=torch.int8)\n")
    assert [found.split()[0] for found in left_to_defaults(tmp_path)] == ["bad.py:2", "bad.py:3"]


ADDRESSES = {
    "kernels/numba_tools.py": "`address`, which checks",
    "predictor/digest.py": "compared alone",
    "predictor/pretrained.py": "bytes for a check value",
    "store/pages.py": "asks the system for huge pages",
    "store/tier.py": "`buffer`, which checks",
}
"""Who may take the address of a tensor's memory, and why."""


def test_compiled_code_gets_checked_addresses_alone() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if ".data_ptr()" in path.read_text()
    }
    assert found == set(ADDRESSES)
