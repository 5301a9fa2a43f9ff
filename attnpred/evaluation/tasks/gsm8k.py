"""GSM8K with chain-of-thought examples before the question (arXiv 2110.14168), as long prompts with short answers.

The published setting of AttentionPredictor (arXiv 2502.04077): 25, 47 and 97 examples fill prompts of about 4K, 8K and 16K
tokens, and 150 tokens are generated. For its sinks and recent window of 128 tokens, set `num_sink_tokens=128` and
`recent_window=128` in the cache's settings.

The examples are the last lines of the file (or those of a second file), the same for all questions; no question is
an example. A file of `question` and `answer`, in which the number stands after `####`.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, final

from attnpred.errors import ConfigError
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.jsonl import Row, read_rows
from attnpred.evaluation.tasks.prompts import prompt

SHOTS = {4096: 25, 8192: 47, 16384: 97}
"""Wanted length: examples of the published prompts."""

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


@final
@dataclass(frozen=True, slots=True)
class Gsm8k(Task):
    """GSM8K: word problems of grade school after many worked ones, from its file.

    shots: examples in a prompt; None goes by `SHOTS`, and for other lengths takes as many as fit. shots_file: of them.
    """

    shots: int | None = None
    shots_file: Path | None = None
    new_tokens: int = 150

    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        rows = read_rows(wanted, "gsm8k")
        others = rows[1:] if self.shots_file is None else read_rows(Wanted(0, 0, file=self.shots_file), "gsm8k")
        solved = [_solved(row) for row in reversed(others)]
        shots = SHOTS.get(wanted.length) if self.shots is None else self.shots
        if shots is None:
            shots = self._fitting(tokenizer, wanted, rows[0], solved)
        if shots > len(solved):
            raise ConfigError(
                f"got {len(rows)} lines in {wanted.file}, expected {shots} examples and a question: give a longer file, or fewer shots"
            )
        before = "".join(reversed(solved[:shots]))
        asked = rows if self.shots_file is not None else rows[: len(rows) - shots]
        found = []
        for i, row in enumerate(asked[: wanted.count]):
            text, number = before + _asked(row), _truth(row)
            tokens = prompt(tokenizer, text, chat=wanted.chat)
            labels = {"shots": shots, "tokens": len(tokens)}
            found.append(Example(str(i), tokens, (Question((), (number,), self.new_tokens, "Question:", labels),)))
        return found

    def score(self, answer: str, question: Question) -> float:
        given = final_number(answer)
        return float(given is not None and given == final_number(question.answers[0]))

    def _fitting(self, tokenizer: Any, wanted: Wanted, row: Row, solved: list[str]) -> int:
        """Return how many examples fit into `wanted.length` with the first question."""
        room = wanted.length - len(prompt(tokenizer, _asked(row), chat=wanted.chat))
        for i, text in enumerate(solved):
            room -= len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if room < 0:
                return i
        return len(solved)


def final_number(text: str) -> Fraction | None:
    """Return the number after the first `####`, else the last number; None if there is none."""
    _, marks, rest = text.partition("####")
    numbers = _NUMBER.findall(rest)[:1] if marks else _NUMBER.findall(text)[-1:]
    return Fraction(numbers[0].replace(",", "").replace("$", "")) if numbers else None


def _asked(row: Row) -> str:
    return f"Question: {row.text('question').strip()}\nAnswer:"


def _solved(row: Row) -> str:
    return f"{_asked(row)} {row.text('answer').strip()}\n\n"


def _truth(row: Row) -> str:
    _, marks, number = row.text("answer").partition("####")
    if not marks or final_number(number) is None:
        raise ConfigError(
            f"got answer {row.text('answer')[-40:]!r} in {row.place}, expected field 'answer' with a number after '####'"
        )
    return number.strip()
