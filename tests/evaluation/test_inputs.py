"""What a row was measured on is in its key: other documents, other rows; and what our rows were measured on stays."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from attnpred.config import CacheConfig
from attnpred.evaluation.grid import full_of, left_over
from attnpred.evaluation.inputs import hash_of, with_inputs
from attnpred.evaluation.plan import Plan, parse_tasks
from attnpred.evaluation.rows import key_of
from attnpred.evaluation.tasks.base import Example, Question
from attnpred.evaluation.texts import program_text
from attnpred.evaluation.variants import parse_variant
from attnpred.hf import load_model

QUESTION = Question((4, 5), ("yes",), 3, "\n", {"depth": 0.5})
EXAMPLE = Example("0", (1, 2, 3), (QUESTION,))
OTHERS = {
    "a token of the document": dataclasses.replace(EXAMPLE, tokens=(1, 2, 4)),
    "its name": dataclasses.replace(EXAMPLE, name="1"),
    "how it is asked": dataclasses.replace(EXAMPLE, in_turn=True),
    **{
        f"the {name} of a question": dataclasses.replace(EXAMPLE, questions=(dataclasses.replace(QUESTION, **{name: value}),))
        for name, value in {"tokens": (4, 6), "answers": ("no",), "new_tokens": 4, "stop": ""}.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_hash_is_of_all_that_the_model_is_given_and_held_against(other: Example) -> None:
    same = dataclasses.replace(EXAMPLE, labels={"text": "book"}, reference=object())
    assert hash_of([EXAMPLE]) == hash_of([same]) != hash_of([other])
    assert hash_of([EXAMPLE, other]) != hash_of([other, EXAMPLE])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("demo", device="cpu")[1]


def plan(text: Path, tokenizer: Any) -> Plan:
    made = Plan(
        model="demo", tasks=parse_tasks("facts1,recovery"), variants=(parse_variant("ema"),), budgets=(0.4,),
        lengths=(300,), config=CacheConfig(budget=1.0), documents=1, steps=8, texts=(str(text),),
    )  # fmt: skip
    return with_inputs(made, tokenizer)


def test_rows_on_a_text_that_was_edited_are_measured_anew_and_compared_with_nothing(
    tokenizer: Any, tmp_path: Path
) -> None:
    text = tmp_path / "mill.txt"
    text.write_text("The mill stood by the river, and the miller was old. " * 60, encoding="utf-8")
    before = plan(text, tokenizer)
    rows = [json.loads(json.dumps(before.key(cell))) for cell in before.cells()]
    assert left_over(plan(text, tokenizer), rows) == []
    text.write_text("The mill stood by the sea, and the miller was young. " * 60, encoding="utf-8")
    after = plan(text, tokenizer)
    assert left_over(after, rows) == after.cells() and len(rows) == 3
    full, sparse, _ = after.cells()
    assert full_of(after, sparse) == key_of(after.key(full)) != key_of(rows[0]) == full_of(before, sparse)


def test_a_row_that_names_no_inputs_is_read_and_is_of_no_cell(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "mill.txt"
    text.write_text("The mill stood by the river, and the miller was old. " * 60, encoding="utf-8")
    made = plan(text, tokenizer)
    bare = [{name: value for name, value in made.key(cell).items() if name != "inputs"} for cell in made.cells()]
    assert left_over(made, bare) == made.cells() and len({key_of(row) for row in bare}) == 3


def test_what_is_known_is_not_made_again(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "mill.txt"
    text.write_text("The mill stood by the river, and the miller was old. " * 60, encoding="utf-8")
    made = plan(text, tokenizer)
    text.unlink()
    assert with_inputs(made, tokenizer) is made


def test_the_program_text_never_changes() -> None:
    """Rows of docs/results were measured on it; it was the package's own source once, which goes on."""
    found = hashlib.sha256(program_text().encode()).hexdigest()
    assert found == "d6ffd3aa1822ba41a90753dd5deb1eb8272b89a895d7e85efad8f6d910102e64"
