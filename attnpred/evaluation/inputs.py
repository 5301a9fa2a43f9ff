"""What a cell is measured on: its documents, and the hash by which its rows name them (`inputs` in a row's key).

The hash is of all that the model is given and held against: token ids of documents and questions, answers, how many tokens
may be generated. A text that was edited, another tokenizer or chat template, and a generator that makes other documents
therefore make other rows: a file that is gone on with never mixes what was measured on one with the other.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from attnpred.evaluation.plan import Plan, TaskWord
from attnpred.evaluation.tasks.base import Example

DIGITS = 16
"""Of the hash, hexadecimal."""


def documents(plan: Plan, tokenizer: Any, task: TaskWord, length: int) -> list[Example]:
    """Return the documents of a task at a length. Raises `ConfigError`."""
    wanted = plan.wanted(task, length)
    wanted = dataclasses.replace(wanted, chat=wanted.chat and bool(tokenizer.chat_template))
    return task.make().examples(tokenizer, wanted)


def hash_of(examples: Sequence[Example]) -> str:
    """Return the hash of what the model is given and held against."""
    found = hashlib.sha256()
    for example in examples:
        asked = [[one.tokens, one.answers, one.new_tokens, one.stop] for one in example.questions]
        given = [example.name, example.tokens, asked, example.in_turn]
        found.update(json.dumps(given, separators=(",", ":")).encode() + b"\n")
    return found.hexdigest()[:DIGITS]


def with_inputs(plan: Plan, tokenizer: Any) -> Plan:
    """Return the plan with its inputs named, as a key needs them: every document is made once. Raises `ConfigError`."""
    pairs = [(task, length) for task in plan.tasks for length in plan.lengths]
    if all((task.word, length) in plan.inputs for task, length in pairs):
        return plan
    hashes = {(task.word, length): hash_of(documents(plan, tokenizer, task, length)) for task, length in pairs}
    return dataclasses.replace(plan, inputs=hashes)
