"""What a row says about where it was made: versions, commit, machine."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("attnpred", "torch", "transformers")


def provenance(device: str) -> dict[str, Any]:
    """Return `versions`, `commit` (None outside a git checkout), and `machine`: cores this process may use, device."""
    return {
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": _commit(),
        "machine": {"cores": _cores(), "threads": torch.get_num_threads(), "device": _device(device)},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that the package lies in, with "+" where tracked files differ from it."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():  # installed: a repository around it is somebody else's
        return None
    try:
        found = [
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0].stdout.strip() + ("+" if found[1].stdout.strip() else "")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1


def _device(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
