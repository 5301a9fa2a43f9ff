"""What `import attnpred` gives, and what it must not load."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import attnpred
from attnpred import hf

PUBLIC = [
    "AttnpredError",
    "CacheConfig",
    "Policy",
    "Predictor",
    "TieredCache",
    "__version__",
    "attach",
    "load_model",
]
HEAVY = ("torch", "transformers", "numba", "triton", "numpy")


def loaded_after(statement: str) -> set[str]:
    """Return the top-level packages loaded by `statement` in a fresh Python."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([name for name in sys.modules if '.' not in name]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_public_names_are_pinned() -> None:
    assert attnpred.__all__ == PUBLIC


def test_every_public_name_exists_and_is_listed() -> None:
    assert all(getattr(attnpred, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(attnpred))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(attnpred, "no_such_name")


def test_import_is_light() -> None:
    assert loaded_after("import attnpred").isdisjoint(HEAVY)


def test_the_check_can_fail() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_the_list_of_named_models_is_light() -> None:
    assert loaded_after("from attnpred.cli.models import collect; collect()").isdisjoint(HEAVY)


def test_every_name_of_hf_is_found_and_hides_no_module() -> None:
    """A module of the same name would be found in its place, once anybody has loaded it."""
    assert sorted(hf._HOMES) == sorted(hf.__all__)
    assert all(getattr(hf, name).__class__ is not ModuleType for name in hf.__all__)
    assert not {path.stem for path in Path(hf.__file__).parent.glob("*.py")} & set(hf.__all__)
    assert not hasattr(hf, "no_such_name")


def test_the_command_line_is_light() -> None:
    assert loaded_after("import attnpred.cli.main").isdisjoint(HEAVY)
