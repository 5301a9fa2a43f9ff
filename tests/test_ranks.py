"""One direction of imports: a module imports only what stands below it, and only hf.py knows transformers.

The rule is checked on the source, so imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import attnpred

PACKAGE = Path(attnpred.__file__).parent

LAYERS = (  # highest first; those on one line never import each other
    ("cli",),
    ("__init__",),
    ("evaluation", "report", "serving"),
    ("capture",),
    ("hf",),
    ("plan",),
    ("decode", "sharing"),
    ("dense_calls",),
    ("rest_rows",),
    ("choosing",),
    ("truth",),
    ("policies", "store"),
    ("predictor",),
    ("kernels", "config", "telemetry"),
    ("files", "shapes", "folders", "reading", "row_check"),
    ("checks",),
    ("errors",),
)
RANKS = {unit: -depth for depth, units in enumerate(LAYERS) for unit in units}

KEPT_APART = {"transformers": "hf"}  # a package, and the only unit that may import it

EXCEPTIONS: dict[tuple[str, str], str] = {}  # (file, what it imports): why it may


def imports(path: Path, package: Path) -> Iterator[str]:
    """Yield the dotted name of everything that `path` imports, wherever in the file it does."""
    inside = [package.name, *path.relative_to(package).with_suffix("").parts]  # a relative import starts from here
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from attnpred import config` imports a module, not a name of the package
            yield from (f"{module}.{alias.name}" if module == package.name else module for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def units(package: Path) -> dict[str, list[Path]]:
    """Return the files of every top-level module and folder of `package`."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        found.setdefault(path.relative_to(package).parts[0].removesuffix(".py"), []).append(path)
    return found


def target(name: str, package: Path) -> str | None:
    """Return the unit of `package` that the import of `name` reaches; None for other packages."""
    first, _, rest = name.partition(".")
    if first != package.name:
        return None
    unit = rest.partition(".")[0]
    return unit if unit in units(package) else "__init__"


def violations(package: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, imported name) for every import that breaks the rule."""
    for unit, paths in units(package).items():
        for path in paths:
            for name in imports(path, package):
                reached = target(name, package)
                allowed_unit = KEPT_APART.get(name.partition(".")[0], unit)
                upwards = reached is not None and reached != unit and RANKS[reached] >= RANKS[unit]
                if upwards or allowed_unit != unit:
                    yield path.relative_to(package).as_posix(), name


def test_every_module_has_a_rank() -> None:
    assert set(units(PACKAGE)) <= set(RANKS), "give the new module its place in LAYERS"


def test_imports_point_downwards() -> None:
    assert [found for found in violations(PACKAGE) if found not in EXCEPTIONS] == []


def test_exceptions_are_still_needed() -> None:
    assert set(EXCEPTIONS) <= set(violations(PACKAGE))


PLANTED = {
    "errors.py": "",
    "shapes.py": "from attnpred.errors import ShapeError\nfrom torch import Tensor\n",
    "config.py": "def late():\n    from attnpred import policies\n",
    "kernels/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import attnpred.store.pool\n",
    "policies/__init__.py": "from attnpred.policies.base import Policy\nfrom . import base\n",
    "policies/base.py": "from attnpred.store import pool\nfrom attnpred import CacheConfig\n",
    "store/__init__.py": "",
    "store/pool.py": "from ..policies import base\n",
    "evaluation/__init__.py": "import attnpred.report\nimport transformers.cache_utils\n",
    "report/__init__.py": "from importlib import import_module\nimport_module('transformers')\n",
    "hf.py": "import transformers\nfrom attnpred.config import CacheConfig\n",
    "cli/__init__.py": "from attnpred import __version__\nfrom attnpred.evaluation import tasks\n",
    "__init__.py": "from attnpred.hf import attach\n",
}


def test_the_check_can_fail(tmp_path: Path) -> None:
    package = tmp_path / "attnpred"
    for name, source in PLANTED.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    assert sorted(violations(package)) == [
        ("config.py", "attnpred.policies"),
        ("evaluation/__init__.py", "attnpred.report"),
        ("evaluation/__init__.py", "transformers.cache_utils"),
        ("kernels/__init__.py", "attnpred.store.pool"),
        ("policies/base.py", "attnpred.CacheConfig"),
        ("policies/base.py", "attnpred.store"),
        ("report/__init__.py", "transformers"),
        ("store/pool.py", "attnpred.policies"),
    ]
