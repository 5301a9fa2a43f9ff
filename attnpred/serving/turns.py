"""`Turns`: the texts between which a conversation's questions and answers stand, taken from a model's chat template.

A template renders a whole conversation at once. Here it is rendered once, with marks in place of the messages, and cut at
the marks; so every turn only adds to what the cache holds, also with templates that treat earlier turns in another way.
A document stands before the first question, in the same message, so that it is the same tokens whatever is asked.
"""

from dataclasses import dataclass
from typing import Any, final

QUESTION, ANSWER, NEXT = "ATTNPREDxQUESTION", "ATTNPREDxANSWER", "ATTNPREDxNEXT"


@final
@dataclass(frozen=True, slots=True)
class Turns:
    """start: before the first question; answer: between a question and its answer; question: between that and the next.

    closing: a text that ends an answer, beside the model's own tokens for it; empty: none. note: why these are not the
    model's own; empty: they are.
    """

    start: str
    answer: str
    question: str
    closing: str = ""
    note: str = ""

    @property
    def is_plain(self) -> bool:
        """True where they are not the model's own; what begins a text is then up to the tokenizer."""
        return bool(self.note)

    def opening(self, document: str) -> str:
        """Return all that comes before the first question."""
        text = document.strip()
        if text:
            return f"{self.start}{text}\n\nQuestion: "
        return self.start + ("Question: " if self.is_plain else "")


def plain(note: str) -> Turns:
    """Return the turns for a model that was never taught any; an answer is one line."""
    return Turns("", "\nAnswer:", "\nQuestion: ", closing="\n", note=note)


def turns_of(tokenizer: Any) -> Turns:
    """Return the turns of this tokenizer's chat template, or plain ones, with a note, where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return plain("the model has no chat template: questions and answers stand under these words, a line each")
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": NEXT},
    ]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        first = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        start, rest = whole.split(QUESTION)
        _, rest = rest.split(ANSWER)
        question, answer = rest.split(NEXT)
    except Exception as error:  # a template is a program of somebody else's, which raises what it likes
        return plain(
            f"the model's chat template cannot be used ({type(error).__name__}): questions are asked without it"
        )
    if first != start + QUESTION + answer:
        return plain("the model's chat template depends on later turns: questions are asked without it")
    return Turns(start, answer, question)
