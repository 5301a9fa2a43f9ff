"""Run the quick tests with several versions of transformers, each in an environment of its own below .venvs.

Run `make test-versions`; arguments go to pytest instead of `-m "not slow"`. The floors are those of pyproject.toml, and the
newest what PyPI has today. An environment has transformers and what it asks for; all else is that of .venv. Only the one
with the floors has a torch of its own, the oldest that is supported: 5 GB. A warning is an error here too.
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
QUICK = ("-m", "not slow")


def floor(package: str) -> str:
    """Return the oldest version of `package` that pyproject.toml allows."""
    found = re.search(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found is not None
    return found[1] if found[1].count(".") > 1 else f"{found[1]}.0"


ROUNDS = {
    "floors": (f"transformers=={floor('transformers')}", f"torch=={floor('torch')}"),
    "between": ("transformers==5.19.0",),
    "newest": ("--upgrade", "transformers"),
}
"""What each environment is asked for, by its name."""


def python_with(name: str) -> Path:
    """Return the Python of that environment, made or brought up to date."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, symlinks=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        # Read after the environment's own packages, and with the .pth files in there, as that of an editable install.
        shared = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (own / "shared.pth").write_text(shared, encoding="utf-8")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-config", "--python", str(python)]
    subprocess.run([*uv, *ROUNDS[name]], check=True)
    return python


def main(arguments: list[str]) -> int:
    """Run the tests; return 1 if those of any environment failed."""
    failed = []
    for name, wanted in ROUNDS.items():
        print(f"== {name}: {' '.join(wanted)}", flush=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [str(python_with(name)), "-m", "pytest", "-q", "--numprocesses", "auto", "--dist", "loadfile"]
        if subprocess.run([*command, *(arguments or QUICK)], cwd=ROOT, env=environment, check=False).returncode:
            failed.append(name)
    print(f"failed with {', '.join(failed)}" if failed else "passed with all of them")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
