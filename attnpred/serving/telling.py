"""`Teller`: the text of one answer as its tokens come, whole letters at a time, up to a text that ends it."""

from collections.abc import Sequence
from typing import Any, final

LETTER = 8
"""Tokens that one letter may take; what is no letter after so many never becomes one."""


@final
class Teller:
    """stops: texts that end the answer and are no part of it. strips: white space before the first letter is left out."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), *, strips: bool = False) -> None:
        self.tokenizer, self.stops, self.is_stopped = tokenizer, tuple(stops), False
        self._strips = strips
        self._ids: list[int] = []
        self._first = self._told = 0  # the window that is decoded, and how much of it has been
        self._held = ""

    def add(self, token: int) -> str:
        """Return the text that is certain now. What may become a stop, or is part of a letter, is held back."""
        self._ids.append(token)
        return self._release(self._new(len(self._ids) - self._told >= LETTER))

    def finish(self) -> str:
        """Return what was held back, when no token follows."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + self._new(True), ""
        return self._begin(text)

    def _new(self, is_last: bool) -> str:
        """Return the text of the tokens since the last letter; decoded with those before, on which spaces depend."""
        before = self._decode(self._first, self._told)
        text = self._decode(self._first, len(self._ids))
        if text.endswith("\ufffd") and not is_last:
            return ""
        self._first, self._told = self._told, len(self._ids)
        return text[len(before) :]

    def _decode(self, start: int, stop: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:stop], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        text = self._begin(self._held + text)
        places = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return text[: min(places)]
        held = max((overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _begin(self, text: str) -> str:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text


def overlap(text: str, stop: str) -> int:
    """Return how many letters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
