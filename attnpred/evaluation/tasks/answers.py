r"""MATH-500 (arXiv 2103.03874) and AIME 2024: one problem, a long derivation, one final answer in \boxed{}.

The prompt is short and the context grows with the answer, so `length` is that of both together: an answer gets
what the prompt leaves of it. Here errors of a small cache build up, as every token depends on those before.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from attnpred.errors import ConfigError
from attnpred.evaluation.latex import final_answer, normal, number, same_answer
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.jsonl import read_rows, refuse_none
from attnpred.evaluation.tasks.prompts import prompt

ASK = (
    "Solve the problem step by step. At the end, write the final answer inside \\boxed{{}}.\n\nProblem: {}\n\nSolution:"
)
SHORTEST = 16
"""Tokens of an answer that it takes at least."""


def _examples(tokenizer: Any, wanted: Wanted, task: str, name: str, labels: tuple[str, ...]) -> list[Example]:
    """Return the examples of a file with `problem` and `answer`; name: the field that names a problem."""
    found: list[Example] = []
    sizes: list[int] = []
    for i, row in enumerate(read_rows(wanted, task)):
        text, answer = row.text("problem"), row.answer("answer")
        if task == "aime24" and (number(normal(answer)) or 0).denominator != 1:
            raise ConfigError(f"got answer {answer!r} in {row.place}, expected field 'answer' with a whole number")
        if len(found) == wanted.count:
            continue
        tokens = prompt(tokenizer, ASK.format(text.strip()), chat=wanted.chat)
        sizes.append(len(tokens) + SHORTEST)
        if sizes[-1] <= wanted.length:
            said = {label: row.values.get(label) for label in labels}
            question = Question((), (answer,), wanted.length - len(tokens), labels=said)
            found.append(Example(str(row.values.get(name, i)), tokens, (question,)))
    refuse_none(found, sizes, wanted, task)
    return found


@final
@dataclass(frozen=True, slots=True)
class Math500(Task):
    """MATH-500: problems of competitions, from its file; answers are LaTeX."""

    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        return _examples(tokenizer, wanted, "math500", "unique_id", ("subject", "level"))

    def score(self, answer: str, question: Question) -> float:
        return float(same_answer(final_answer(answer), question.answers[0]))


@final
@dataclass(frozen=True, slots=True)
class Aime24(Task):
    """AIME 2024: problems of a competition, from its file; answers are whole numbers from 0 to 999."""

    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        return _examples(tokenizer, wanted, "aime24", "id", ())

    def score(self, answer: str, question: Question) -> float:
        return float(same_answer(final_answer(answer), question.answers[0]))
