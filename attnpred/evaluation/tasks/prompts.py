"""Prompts as token ids: as plain text or in the tokenizer's chat template, cut in the middle where they are too long.

The ids of a cut prompt are those of the whole one with its middle left out, so that its length is exact. (LongBench
decodes and encodes them once more, which may change a token at the cut.)
"""

from typing import Any

from attnpred.errors import ConfigError
from attnpred.evaluation.tasks.haystack import encode

_HERE = "@@here@@"


def prompt(tokenizer: Any, text: str, *, chat: bool, length: int | None = None, begin: str = "") -> tuple[int, ...]:
    """Return the ids of a prompt; of its first and last tokens only, if it were longer than `length`.

    chat: as a user's message in the chat template. begin: with which the answer begins. Raises `ConfigError`.
    """
    if not chat:
        ids = list(tokenizer(text + begin, verbose=False)["input_ids"])
        return tuple(ids if length is None else without_middle(ids, length))
    before, after = _frame(tokenizer)
    head, tail, ids = encode(tokenizer, before), encode(tokenizer, after + begin), encode(tokenizer, text)
    if length is not None:
        if length <= len(head) + len(tail):
            raise ConfigError(
                f"got length {length}, expected more than {len(head) + len(tail)}, the chat template alone"
            )
        ids = without_middle(ids, length - len(head) - len(tail))
    return (*head, *ids, *tail)


def without_middle(ids: list[int], length: int) -> list[int]:
    """Return the first and the last ids, `length` in all; all of them if there are no more."""
    return ids if len(ids) <= length else ids[: length // 2] + ids[len(ids) - (length - length // 2) :]


def _frame(tokenizer: Any) -> tuple[str, str]:
    """Return what the chat template writes before and after a user's message."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("got a tokenizer without a chat template, expected one: give --no-chat")
    message = [{"role": "user", "content": _HERE}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(_HERE)
    return before, after
