"""RULER's question answering (arXiv 2404.06654, appendix B) from a JSONL: the right document among those of other questions.

A line has `question` (or `input`), `answers` (or `outputs`: texts, any of which is right) and `context`, a document
that holds the answer.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from attnpred.errors import ConfigError
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted, require_file
from attnpred.evaluation.tasks.haystack import encode, opening, room_for
from attnpred.evaluation.tasks.ruler_parts import any_found

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
NEW_TOKENS = 32


@final
@dataclass(frozen=True, slots=True)
class QuestionAnswering(Task):
    """RULER: questions about one of many documents, from a JSONL of questions, answers and documents."""

    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        lines = read_lines(require_file(wanted, "qa"))
        return [self._example(tokenizer, lines, wanted, i) for i in range(min(wanted.count, len(lines)))]

    def _example(self, tokenizer: Any, lines: list[dict[str, Any]], wanted: Wanted, i: int) -> Example:
        rng = random.Random(f"{wanted.seed}/qa/{wanted.length}/{i}")
        line = lines[i]
        begin = opening(tokenizer) + encode(tokenizer, f"{ORDER}\n\nThe following are given documents.\n\n")
        tail = encode(tokenizer, f"\n{ORDER}\n\nQuestion: {line['question']} Answer:")
        own = encode(tokenizer, f"Document:\n{line['context']}\n\n")
        room = room_for(wanted, "qa", len(begin), len(own), len(tail))
        contexts = sorted({other["context"] for other in lines} - {line["context"]})
        rng.shuffle(contexts)
        pieces: list[list[int]] = []
        for context in contexts:
            # a document that has an answer by chance would not be a distractor
            if not any(answer.lower() in context.lower() for answer in line["answers"]):
                pieces.append(encode(tokenizer, f"Document:\n{context}\n\n"))
            if sum(map(len, pieces)) >= room:
                pieces[-1] = pieces[-1][: len(pieces[-1]) - (sum(map(len, pieces)) - room)]
                break
        place = rng.randrange(len(pieces) + 1)
        body = [token for piece in (*pieces[:place], own, *pieces[place:]) for token in piece]
        depth = round(sum(map(len, pieces[:place])) / max(1, len(body)), 3)
        question = Question(tuple(tail), tuple(line["answers"]), NEW_TOKENS, "\n", {"depth": depth})
        return Example(str(i), (*begin, *body), (question,))

    def score(self, answer: str, question: Question) -> float:
        return any_found(answer, question)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines as {question, answers, context}. Raises `ConfigError` with the place in the file."""
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise ConfigError(f"got {file}, line {number}, which is no JSON object: one question per line")
        said = {
            "question": line.get("question", line.get("input")),
            "answers": line.get("answers", line.get("outputs")),
            "context": line.get("context"),
        }
        for name, value in said.items():
            is_right = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
            if not (is_right if name == "answers" else isinstance(value, str)):
                expected = "a list of texts" if name == "answers" else "a text"
                raise ConfigError(f"got {file}, line {number}, without {name!r}, expected {expected} there")
        found.append(said)
    if not found:
        raise ConfigError(f"got {file} without a line, expected one question per line")
    return found
