"""From messages and documents to the tokens of a prompt, and back from tokens to places in a document.

Documents stand before the first question, in the same message, so that they are the same tokens whatever is asked
(`attnpred.serving.turns`), and what was read of them serves every question. A model without a usable chat template gets the
plain turns of `attnpred chat`; it has no tools then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from attnpred.errors import ConfigError
from attnpred.reading import can_be_written
from attnpred.serving.turns import Turns, turns_of

Message = Mapping[str, Any]


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where a document stands in the text of a prompt: from letter `start` on, `length` letters."""

    document: str
    start: int
    length: int


@final
@dataclass(frozen=True, slots=True)
class Prompt:
    """text, its tokens, and where each begins and ends in it (empty where the tokenizer cannot tell)."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    places: tuple[Place, ...] = ()

    @property
    def common(self) -> int:
        """How many of its tokens are over where the last document ends; 0 where there is none, or no place is known."""
        end = max((place.start + place.length for place in self.places), default=0)
        count = sum(last <= end for _, last in self.spans) if end else 0
        return count if count < len(self.ids) else 0

    def letters(self, start: int, stop: int) -> tuple[str, int, int] | None:
        """Return (document, first letter, last letter) of tokens `start` to `stop`; None where they are in none."""
        if start >= len(self.spans):
            return None
        first, last = self.spans[start][0], self.spans[min(stop, len(self.spans)) - 1][1]
        for place in self.places:
            left, right = max(first, place.start), min(last, place.start + place.length)
            if left < right:
                return place.document, left - place.start, right - place.start
        return None


@final
class Prompts:
    """Makes prompts for one model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.turns: Turns = turns_of(tokenizer)
        template = str(getattr(tokenizer, "chat_template", None) or "")
        self.has_tools = not self.turns.is_plain and "tools" in template and "<tool_call>" in template

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer of a chat, beside the model's own tokens."""
        return (self.turns.closing,) if self.turns.closing else ()

    def chat(
        self,
        messages: Sequence[Message],
        documents: Mapping[str, str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """Return the prompt for the next answer. documents: texts by id. Raises `ConfigError`."""
        texts = {name: text.strip() for name, text in (documents or {}).items()}
        changed = [dict(message) for message in messages]
        if texts:
            first = next((one for one in changed if one["role"] == "user"), None)
            if first is None:
                raise ConfigError("got documents without a message of the user, expected one to ask about them")
            first["content"] = "\n\n".join([*texts.values(), f"Question: {first['content']}"])
        text = self._plain(changed) if self.turns.is_plain else self._rendered(changed, tools)
        ids, spans = self.tokens(text, special=self.turns.is_plain)
        return Prompt(text, ids, spans, _places(text, texts))

    def document(self, name: str, text: str) -> Prompt:
        """Return the beginning of every prompt about one document: all before the question."""
        whole = self.chat([{"role": "user", "content": "?"}], {name: text})
        end = whole.places[0].start + whole.places[0].length
        count = sum(last <= end for _, last in whole.spans) if whole.spans else len(whole.ids)
        return Prompt(whole.text[:end], whole.ids[:count], whole.spans[:count], whole.places)

    def tokens(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens of a text, and where they stand in it. special: with what begins one. Raises `ConfigError`."""
        if not can_be_written(text):
            raise ConfigError("got text with half of a letter (a lone surrogate), expected whole ones")
        is_fast = bool(getattr(self.tokenizer, "is_fast", False))
        found = self.tokenizer(
            text, add_special_tokens=special, verbose=False, return_offsets_mapping=is_fast, return_attention_mask=False
        )
        return list(found["input_ids"]), [tuple(span) for span in found.get("offset_mapping", ())]

    def _rendered(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of somebody else's, which raises what it likes
            first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ConfigError(
                f"got messages that the model's chat template refuses ({first}), expected others"
            ) from None
        return str(text)

    def _plain(self, messages: list[dict[str, Any]]) -> str:
        words = {"user": "Question: {}\n", "assistant": "Answer: {}\n"}
        parts = []
        for one in messages:
            form = words.get(one["role"], "{}\n\n")
            has_word = one["role"] == "user" and "\n\nQuestion: " in str(one["content"])
            parts.append(f"{one['content']}\n" if has_word else form.format(one["content"]))
        return "".join(parts) + "Answer:"


def _places(text: str, texts: Mapping[str, str]) -> tuple[Place, ...]:
    found, start = [], 0
    for name, own in texts.items():
        start = text.find(own, start)
        if start >= 0 and own:
            found.append(Place(name, start, len(own)))
            start += len(own)
        start = max(start, 0)
    return tuple(found)
