"""How good and how costly a policy is. A task makes documents and scores answers: (right, asked).

To add one: its file, and its line in `TASKS`.
"""

from collections.abc import Callable
from typing import Any

from attnpred.evaluation import facts_task

TASKS: dict[str, Callable[..., Any]] = {"facts": facts_task.score}
