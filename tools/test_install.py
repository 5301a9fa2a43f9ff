"""Install the built wheel in a fresh environment, once for every extra, and use it there as a new user would.

Run `make test-install`. It needs the package index and some gigabytes, because each environment has all that the extra
brings. The first one is made from the sdist, so that this is whole too.
`tests/test_wheel.py` tries the same without network.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("plot", "fast", "gguf", "serve", "eval", "rivals", "docs")
USE = """
import attnpred
model, tokenizer = attnpred.load_model("demo")
inputs = tokenizer("The number of Ruth is 4711." + " It rained all day." * 200, return_tensors="pt")
with attnpred.attach(model, budget=1 / 4) as attached:
    model.generate(**inputs, max_new_tokens=2)
    assert attached.stats()["total"]["compression"] > 2, attached.stats()
"""


def build(folder: Path) -> tuple[Path, Path]:
    """Build sdist and wheel into `folder`; return both."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def trial(wanted: str, folder: Path) -> str:
    """Install `wanted` and use it; return what went wrong, or nothing."""
    uv, python = [sys.executable, "-m", "uv"], folder / "bin" / "python"
    steps = (
        [*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)],
        [*uv, "pip", "install", "--quiet", "--no-config", "--python", str(python), wanted],
        [str(folder / "bin" / "attnpred"), "info"],
        [str(python), "-c", USE],
    )
    for step in steps:
        done = subprocess.run(step, cwd=folder.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(step[:4])}: {done.stderr[-2000:]}"
    return ""


def main() -> int:
    """Return 1 if any failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        sdist, wheel = build(Path(name))
        for extra, wanted in [("none, from the sdist", str(sdist)), *((e, f"{wheel}[{e}]") for e in EXTRAS)]:
            why = trial(wanted, Path(name) / "environment")
            print(f"{extra}: {why or 'works'}", flush=True)
            failed |= bool(why)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
