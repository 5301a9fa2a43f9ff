"""The tasks of the grid, by name. To add one: its file, and its line in `TASKS`."""

from attnpred.evaluation.tasks.base import Example, Item, Question, Session, Task, Wanted

TASKS: dict[str, type[Task]] = {}

__all__ = ["TASKS", "Example", "Item", "Question", "Session", "Task", "Wanted"]
