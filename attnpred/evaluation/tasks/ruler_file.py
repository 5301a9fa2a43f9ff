"""RULER's own files (arXiv 2404.06654): JSON lines with `index`, `input`, `outputs` and `length`.

The input is the whole prompt, begin of the answer included (newer files have that in `answer_prefix`). It is never cut, as
that could take away what is asked for: examples of more than the wanted length are left out.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, final

from attnpred.evaluation.metrics import all_found, any_found
from attnpred.evaluation.tasks.base import Example, Question, Task, Wanted
from attnpred.evaluation.tasks.jsonl import read_rows, refuse_none
from attnpred.evaluation.tasks.prompts import prompt


@final
@dataclass(frozen=True, slots=True)
class RulerFile(Task):
    """RULER: any of its tasks, from its own file; share of the wanted words that is found.

    any_of: one of the outputs is enough (its qa tasks), else they are all wanted.

    new_tokens: 128 for the needles, 120, 50, 30 and 32 for common words, frequent words, tracking and qa are published;
    the longest does for all, as only what stands in an answer counts.
    """

    any_of: bool = False
    new_tokens: int = 128

    metric: ClassVar[str] = "outputs_found"
    needs_file: ClassVar[bool] = True

    def examples(self, tokenizer: Any, wanted: Wanted) -> list[Example]:
        found: list[Example] = []
        sizes: list[int] = []
        for i, row in enumerate(read_rows(wanted, "ruler_file")):
            outputs, text = row.texts("outputs"), row.text("input")
            if len(found) == wanted.count:
                continue
            tokens = prompt(tokenizer, text, chat=wanted.chat, begin=row.text("answer_prefix", ""))
            sizes.append(len(tokens))
            if len(tokens) <= wanted.length:
                question = Question((), outputs, self.new_tokens, labels={"tokens": len(tokens)})
                found.append(Example(str(row.values.get("index", i)), tokens, (question,)))
        refuse_none(found, sizes, wanted, "ruler_file")
        return found

    def score(self, answer: str, question: Question) -> float:
        return (any_found if self.any_of else all_found)(answer, question.answers)
