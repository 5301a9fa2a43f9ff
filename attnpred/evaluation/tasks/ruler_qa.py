"""RULER's question answering (arXiv 2404.06654, appendix B) from a JSONL: the right document among those of other questions.

A line has `question` (or `input`), `answers` (or `outputs`: texts, any of which is right) and `context`, a document
that holds the answer.
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar, final

from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.haystack import encode, opening, room_for
from attnpred.evaluation.tasks.jsonl import Row, read_rows
from attnpred.evaluation.tasks.ruler_parts import any_found

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
NEW_TOKENS = 32


@final
@dataclass(frozen=True, slots=True)
class QuestionAnswering(Task):
    """RULER: questions about one of many documents, from a JSONL of questions, answers and documents."""

    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        lines = [_said(row) for row in read_rows(wanted, "qa")]
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


def _said(row: Row) -> dict[str, Any]:
    """Return question, answers and context of a line, by either of their names. Raises `ConfigError` with its place."""
    other = {"question": "input", "answers": "outputs"}
    names = {name: also if name not in row.values and also in row.values else name for name, also in other.items()}
    return {
        "question": row.text(names["question"]),
        "answers": row.texts(names["answers"]),
        "context": row.text("context"),
    }
