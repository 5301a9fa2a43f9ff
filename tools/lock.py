"""Write requirements.lock: one exact version of everything that `make` installs, for every supported Python.

Run `make lock`; `make lock UPGRADE=1` moves to the newest versions instead of keeping the pins that still fit.
The answer is worked out by uv against PyPI alone, so no machine's own index, local build or path can leak into it.
What only torch asks for by exact version (CUDA libraries) is left to torch: a build of torch for CPUs, which satisfies
the same pin, then brings none of it. triton stays, as the tests run it without a GPU: in the version that the builds of
torch for CUDA ask for, and where pyproject.toml wants it, which is on fewer machines than torch does.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
EXTRAS = ("plot", "fast", "gguf", "rivals", "serve", "docs", "dev")
HEADER = f"# Written by `make lock` from pyproject.toml (core, {', '.join(EXTRAS)}). Do not edit.\n"
LEFT_TO_TORCH = re.compile(r"(nvidia|cuda)-")
MACHINE = "platform_machine == 'x86_64'"
OTHER_PLATFORM = "sys_platform == 'emscripten'"


def wanted(line: str) -> bool:
    """Return whether `line` of uv's answer belongs in the lock."""
    return bool(line) and not LEFT_TO_TORCH.match(line) and OTHER_PLATFORM not in line


def narrowed(line: str) -> str:
    """Return `line` as it is, or for triton with the condition of pyproject.toml beside that of torch."""
    pin, _, condition = line.strip().partition(" ; ")
    if not pin.startswith("triton=="):
        return line
    return f"{pin} ; ({condition or MACHINE}) and {MACHINE}\n"


def main() -> int:
    """Write the lock; return the exit code."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
    command += [word for extra in EXTRAS for word in ("--extra", extra)]
    command += ["--universal", "--python-version", "3.10", "--no-header", "--no-annotate", "--quiet", "--no-config"]
    command += ["--output-file", LOCK.name, *sys.argv[1:]]  # uv keeps the pins it finds in the output file
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    if code == 0:
        lines = LOCK.read_text(encoding="utf-8").splitlines(keepends=True)
        LOCK.write_text(HEADER + "".join(map(narrowed, filter(wanted, lines))), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
