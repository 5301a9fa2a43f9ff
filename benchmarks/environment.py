"""What a benchmark's JSON says of where it ran."""

import platform
import subprocess
from typing import Any

import torch
import transformers


def environment() -> dict[str, Any]:
    """Return commit, versions and threads."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }
