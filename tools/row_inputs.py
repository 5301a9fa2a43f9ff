"""Name the inputs of rows that were written before rows named them: `python -m tools.row_inputs FILE ... [--files FOLDER]`.

The documents of a row are made again from its model's tokenizer, its seed and settings, and their hash is put into the row
(`attnpred.evaluation.inputs`). That is honest while the generators make what they made then. What a row still has of its
items has to agree: names, labels, and the score of the answer that was given. A row that does not agree, or whose files are
not there, is told and stays as it is. `--files` names the folder of task files and of texts that rows know by their name.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from attnpred.config import CacheConfig
from attnpred.errors import ConfigError
from attnpred.evaluation.grid import LONGEST_TEXT
from attnpred.evaluation.inputs import documents, hash_of
from attnpred.evaluation.plan import Plan, TaskWord, parse_task
from attnpred.evaluation.rows import Row
from attnpred.evaluation.tasks import Example, Task
from attnpred.evaluation.tasks.recovery import KINDS
from attnpred.files import write_text
from attnpred.hf import source_of
from attnpred.row_check import CHECK, require_unchanged, with_check


@lru_cache
def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a model by name."""
    return AutoTokenizer.from_pretrained(source_of(model))


@lru_cache
def made(model: str, word: str, length: int, seed: int, settings: str, files: Path | None) -> list[Example]:
    """Return the documents of the rows with these words; settings is JSON. Raises `ConfigError`."""
    said = json.loads(settings)
    name, equals, file = word.partition("=")
    task = TaskWord(word, name, (str(there(file, files)),)) if equals else parse_task(word)
    plan = Plan(
        model, (task,), (), (), (length,), CacheConfig(), seed=seed, documents=said["documents"], steps=said["steps"],
        limit=said["limit"], chat=said["chat"], texts=tuple(text if text in KINDS else str(there(text, files)) for text in said["texts"]),
    )  # fmt: skip
    return documents(plan, tokenizer_of(model), task, length)


def there(name: str, files: Path | None) -> Path:
    """Return the file that a row knows as `name`, as it stands, in `files`, or there with the ending of a text."""
    tried = [Path(name), *(files / found for found in (name, f"{name}.txt") if files)]
    for path in tried:
        if path.is_file():
            return path
    raise ConfigError(f"got a row of {name!r}, expected that file: name its folder with --files")


def agrees(row: Row, task: Task, examples: Sequence[Example]) -> bool:
    """Return whether what `row` has of its items is what `examples` give; true of a row without any."""
    asks = type(task).run is Task.run  # else its items are no questions
    asked = {f"{one.name}/{i}": question for one in examples if asks for i, question in enumerate(one.questions)}
    names = {one.name for one in examples}
    for item in row.get("items", []):
        question = asked.get(item["name"])
        if question is None:
            if item["name"] not in names and item["name"].rpartition("/")[0] not in names:
                return False
        elif json.loads(json.dumps(question.labels)) != item["labels"] or (
            len(item["text"]) < LONGEST_TEXT and task.score(item["text"], question) != item["value"]
        ):
            return False
    return True


def named(row: Row, files: Path | None) -> Row:
    """Return the row with its inputs named. Raises `ConfigError` where they cannot be known."""
    if "inputs" in row:
        return row
    if "settings" not in row:
        raise ConfigError("got a row without its settings, expected what made it")
    settings = json.dumps(row["settings"], sort_keys=True)
    examples = made(row["model"], row["task"], row["length"], row["seed"], settings, files)
    if not agrees(row, parse_name(row["task"]), examples):
        raise ConfigError(f"got a row of {row['task']} at {row['length']} on other documents than today's")
    found: Row = {}
    for name, value in row.items():
        found |= {name: value}
        if name == "settings":
            found["inputs"] = hash_of(examples)
    return with_check(found) if CHECK in row else found


def parse_name(word: str) -> Task:
    """Return the task of a row's word."""
    return TaskWord(word, word.partition("=")[0], ()).make()


def main(arguments: list[str]) -> int:
    """Name what can be named; return the exit code: 1 if some rows stay without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--files", type=Path, help="folder of task files and texts")
    chosen = parser.parse_args(arguments)
    left = 0
    for path in chosen.rows:
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            require_unchanged(row, f"{path} line {number}")
            try:
                rows.append(named(row, chosen.files))
            except ConfigError as error:
                print(f"{path} line {number} stays as it is: {error}", file=sys.stderr)
                rows.append(row)
                left += 1
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
