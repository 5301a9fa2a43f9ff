"""POST /v1/responses: OpenAI's newer interface, as a layer over a chat. Nothing is stored or continued by id."""

import secrets
import time
from typing import Any, final

from fastapi import APIRouter, Request
from starlette.responses import Response

from attnpred.serving.job import Done, Ended, Event, Said
from attnpred.serving.web.chat import prepared
from attnpred.serving.web.documented import ANSWERS
from attnpred.serving.web.serving import note, service_of
from attnpred.serving.web.shapes import counters
from attnpred.serving.web.stream import reply
from attnpred.serving.web.wire import ChatMessage, ChatRequest, ResponseRequest

router = APIRouter()


@final
class Answering:
    """Collects one response, and makes the events of its stream."""

    def __init__(self, asked: ResponseRequest) -> None:
        self.asked, self.created = asked, int(time.time())
        self.id, self.item = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self.text, self.reason, self.number = "", "", 0
        self.done: Done | None = None
        self.counters: dict[str, Any] = {}

    def chunks(self, event: Event) -> list[tuple[str, Any]]:
        """Take in an event; return what a stream says of it."""
        out = self._opening() if not self.number else []
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        if isinstance(event, Said):
            self.text += event.text
            out.append(self._event("response.output_text.delta", place | {"delta": event.text, "logprobs": []}))
        elif isinstance(event, Ended):
            self.reason, self.counters = event.reason, counters(event)
        elif isinstance(event, Done):
            self.done = event
            out.append(self._event("response.output_text.done", place | {"text": self.text, "logprobs": []}))
            out.append(self._event("response.content_part.done", place | {"part": self._part()}))
            out.append(self._event("response.output_item.done", {"output_index": 0, "item": self._message()}))
            kind = "response.completed" if self.reason == "stop" else "response.incomplete"
            out.append(self._event(kind, {"response": self.body()}))
        return out

    def _opening(self) -> list[tuple[str, Any]]:
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        empty = self._message() | {"status": "in_progress", "content": []}
        return [
            self._event("response.created", {"response": self.body()}),
            self._event("response.in_progress", {"response": self.body()}),
            self._event("response.output_item.added", {"output_index": 0, "item": empty}),
            self._event("response.content_part.added", place | {"part": self._part() | {"text": ""}}),
        ]

    def _event(self, name: str, data: dict[str, Any]) -> tuple[str, Any]:
        number, self.number = self.number, self.number + 1
        return name, {"type": name, "sequence_number": number} | data

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def _message(self) -> dict[str, Any]:
        status = "completed" if self.reason == "stop" else "incomplete"
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": [self._part()]}

    def body(self) -> dict[str, Any]:
        """Return the response as it is now."""
        status = "in_progress" if self.done is None else "completed" if self.reason == "stop" else "incomplete"
        used = None
        if self.done is not None:
            used = {
                "input_tokens": self.done.prompt,
                "input_tokens_details": {"cached_tokens": self.done.reused, "cache_write_tokens": 0},
                "output_tokens": self.done.new,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.done.prompt + self.done.new,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.asked.model,
            "output": [] if self.done is None else [self._message()],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.asked.instructions,
            "metadata": {},
            "parallel_tool_calls": False,
            "temperature": self.asked.temperature,
            "top_p": self.asked.top_p,
            "tool_choice": "none",
            "tools": [],
            "usage": used,
            "attnpred": self.counters,
        }


@router.post("/v1/responses", responses=ANSWERS, response_model=None)
async def respond(request: Request, asked: ResponseRequest) -> Response:
    """Answer a conversation."""
    service, owner = service_of(request, asked.model)
    prompt, events, job = await prepared(service, owner, _as_chat(asked))
    answer = Answering(asked)
    await events.submit(service.engine, job)
    note(request, service, prompt, job)
    return await reply(request, events, answer, bool(asked.stream), end="")


def _as_chat(asked: ResponseRequest) -> ChatRequest:
    messages = [] if asked.instructions is None else [ChatMessage(role="system", content=asked.instructions)]
    if isinstance(asked.input, str):
        messages.append(ChatMessage(role="user", content=asked.input))
    else:
        messages += [ChatMessage(role=one.role, content=one.content) for one in asked.input]
    return ChatRequest(
        model=asked.model,
        messages=messages,
        temperature=asked.temperature,
        top_p=asked.top_p,
        max_tokens=asked.max_output_tokens,
        policy=asked.policy,
        budget=asked.budget,
        documents=asked.documents,
    )
