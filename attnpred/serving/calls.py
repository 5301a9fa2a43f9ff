"""Tool calls in the text of an answer: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as templates teach it."""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any, final

from attnpred.serving.telling import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@final
@dataclass
class Calls:
    """Takes the text of one answer as it comes, and gives it back without the calls. found: those that are complete."""

    found: list[dict[str, Any]] = field(default_factory=list)
    _held: str = ""

    def add(self, text: str, *, is_last: bool = False) -> str:
        """Return the text that is no part of a call. What is not closed, or no JSON, is text after all."""
        self._held += text
        told = ""
        while True:
            start = self._held.find(OPEN)
            if start < 0:
                held = 0 if is_last else overlap(self._held, OPEN)
                told += self._held[: len(self._held) - held]
                self._held = self._held[len(self._held) - held :]
                return told
            stop = self._held.find(CLOSE, start)
            if stop < 0 and not is_last:
                told, self._held = told + self._held[:start], self._held[start:]
                return told
            body = self._held[start + len(OPEN) : stop if stop >= 0 else None]
            after = stop + len(CLOSE) if stop >= 0 else len(self._held)
            call = _parsed(body)
            told += self._held[: after if call is None else start]
            self._held = self._held[after:]
            if call is not None:
                self.found.append(call)


def _parsed(body: str) -> dict[str, Any] | None:
    """Return the call as OpenAI's clients expect it; None for what is none."""
    try:
        found = json.loads(body)
        name, arguments = found["name"], found.get("arguments", {})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    call = {"name": name, "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call}
