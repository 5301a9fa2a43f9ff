"""Run the quick tests with several versions of transformers, each in an environment of its own below .venvs.

Run `make test-versions`; arguments go to pytest instead of `-m "not slow"`. The floor is that of pyproject.toml, and the
newest what PyPI has today. An environment has transformers and what it asks for; torch and all else are those of .venv,
because a second torch takes gigabytes. A warning is an error here too.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venvs"
BETWEEN = "5.19.0"
QUICK = ("-m", "not slow")


def floor() -> str:
    """Return the oldest version that pyproject.toml allows."""
    found = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def python_with(version: str | None) -> Path:
    """Return the Python of an environment with that version of transformers, or with the newest."""
    folder = ENVIRONMENTS / (version or "newest")
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        # Read after the environment's own packages, and with the .pth files in there, as that of an editable install.
        shared = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (own / "shared.pth").write_text(shared, encoding="utf-8")
    wanted = ["transformers", "--upgrade"] if version is None else [f"transformers=={version}"]
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-config", "--python", str(python)]
    subprocess.run([*uv, *wanted], check=True)
    return python


def main(arguments: list[str]) -> int:
    """Run the tests; return 1 if those of any version failed."""
    failed = []
    for version in (floor(), BETWEEN, None):
        name = f"transformers {version or 'of today'}"
        print(f"== {name}", flush=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [str(python_with(version)), "-m", "pytest", "-q", *(arguments or QUICK)]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            failed.append(name)
    print(f"failed with {', '.join(failed)}" if failed else "passed with all of them")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
