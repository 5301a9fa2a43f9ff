"""`Quiz`: a part of a book with eight facts hidden in it, and a question about each in the model's chat template.

A fact is a sentence that could stand in a novel, and its answer a number or a word that a model cannot guess. Which kind
of fact and question a model of 135 M parameters can answer at 7,000 tokens was found out on another book (docs/LOG.md,
2026-11-28), so nothing was fitted to the text that is shown. The questions come after the text, in the same message, so the
text is the same tokens whatever is asked.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpred.errors import ConfigError

TEXT = Path(__file__).parent.parent / "assets" / "island.txt"
TITLE = "The Island of Doctor Moreau, H. G. Wells"
SYSTEM = "You answer questions about a text."
TASK = "Read this part of a book. Some facts are hidden in it; remember them.\n\n"
ASK = "Answer in one short sentence, from the text above. "
MARK = "ATTNPREDxTEXT"


@dataclass(frozen=True, slots=True)
class QuizFact:
    """`statement` goes into the text, `question` asks for it, and an answer is right if `answer` stands in it."""

    statement: str
    question: str
    answer: str

    def is_right(self, given: str) -> bool:
        """True if `given` has the answer, as a word of its own."""
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", given, re.IGNORECASE) is not None


FACTS = (
    QuizFact(
        "The rent of the yellow cottage is 88 pounds a year.", "What is the rent of the yellow cottage?", "88"
    ),
    QuizFact(
        "The telephone number of Doctor Perkins is 5520.", "What is the telephone number of Doctor Perkins?", "5520"
    ),
    QuizFact("The lucky number of the gardener is 613.", "What is the lucky number of the gardener?", "613"),
    QuizFact("The night train to Vienna leaves at 9:45.", "When does the night train to Vienna leave?", "9:45"),
    QuizFact(
        "The old clock in the kitchen stopped at 3:20.", "When did the old clock in the kitchen stop?", "3:20"
    ),
    QuizFact("The price of the grey horse is 42 guineas.", "What is the price of the grey horse?", "42"),
    QuizFact("The distance to the next village is 17 miles.", "What is the distance to the next village?", "17"),
    QuizFact(
        "The favourite colour of Aunt Philippa is turquoise.", "What is the favourite colour of Aunt Philippa?",
        "turquoise",
    ),
)  # fmt: skip
"""No two numbers begin with the same digit: a model this small mixes up those that do."""


@dataclass(frozen=True, slots=True)
class Quiz:
    """text: what stands before the questions, template included, and `ids` its tokens; facts in the order of the text.

    spans: where each token of `ids` stands in `text`; places: where each fact's statement begins there. after: what
    stands between a question and its answer.
    """

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    facts: list[QuizFact]
    places: list[int]
    after: str

    def place(self, fact: QuizFact) -> int:
        """Return where the statement of `fact` begins in `text`."""
        return self.places[self.facts.index(fact)]

    def question_ids(self, tokenizer: Any, fact: QuizFact) -> list[int]:
        """Return the tokens that follow `ids` to ask for `fact`, up to where the answer begins."""
        asked = f"\n\n{ASK}{fact.question}{self.after}"
        ids: list[int] = tokenizer(asked, add_special_tokens=False)["input_ids"]
        return ids


def make_quiz(tokenizer: Any, book: str, seed: int = 1) -> Quiz:
    """Hide the facts in `book`, one in each of as many equal parts, each at the end of a sentence.

    Raises `ConfigError` for a tokenizer without a chat template, and for a book without as many sentences.
    """
    before, after = _template(tokenizer)
    rng = random.Random(seed)
    facts = rng.sample(FACTS, len(FACTS))
    text, places, last = before + TASK, [], 0
    for i, fact in enumerate(facts):
        first, end = len(book) * i // len(facts), len(book) * (i + 1) // len(facts)
        stops = [found.end() for found in re.finditer(r"[.!?]\"? ", book[first:end])]
        if not stops:
            raise ConfigError(
                f"got a text without {len(facts)} sentences, expected one to hide facts in: give a longer one"
            )
        place = first + rng.choice(stops)
        text += book[last:place]
        places.append(len(text))
        text += fact.statement + " "
        last = place
    text += book[last:].rstrip()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return Quiz(text, encoded["input_ids"], encoded["offset_mapping"], facts, places, after)


def _template(tokenizer: Any) -> tuple[str, str]:
    """Return what the chat template puts before a first message, and between its end and the answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("got a model without a chat template, expected one that answers questions: use --model demo")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": MARK}]
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, after = whole.partition(MARK)
    return before, after
