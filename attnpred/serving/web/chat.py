"""POST /v1/chat/completions: one answer or several, whole or streamed."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, final

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from attnpred.serving.calls import Calls
from attnpred.serving.job import Done, Ended, Event, Job, Read, Said
from attnpred.serving.prompts import Prompt
from attnpred.serving.service import Service
from attnpred.serving.web.documented import ANSWERS
from attnpred.serving.web.serving import note, prompt_of, service_of
from attnpred.serving.web.shapes import counters, looks, probabilities, timings, usage
from attnpred.serving.web.stream import Events, reply
from attnpred.serving.web.wire import ChatRequest

router = APIRouter()


@final
class Answer:
    """Collects one chat completion, and makes the chunks of its stream."""

    def __init__(self, service: Service, asked: ChatRequest, prompt: Prompt) -> None:
        self.service, self.asked, self.prompt = service, asked, prompt
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        rows = range(asked.n or 1)
        self.texts = ["" for _ in rows]
        self.reasons: list[str | None] = [None for _ in rows]
        self.tokens: list[list[dict[str, Any]]] = [[] for _ in rows]
        self.calls = [Calls() for _ in rows]
        self.told = [0 for _ in rows]
        self.counters: dict[str, Any] = {}
        self.done: Done | None = None
        self.has_tools = bool(asked.callable_tools)

    def chunks(self, event: Event) -> list[tuple[str, Any]]:
        """Take in an event; return what a stream says of it."""
        if isinstance(event, Read):
            own = {"read": event.done, "of": event.total, "reused": event.reused}
            return [("", self._chunk([], attnpred=own))] if self.asked.reads else []
        if isinstance(event, Said):
            return self._said(event)
        if isinstance(event, Ended):
            return self._ended(event)
        if isinstance(event, Done):
            self.done = event
            options = self.asked.stream_options
            if options is None or not options.include_usage:
                return []
            return [("", self._chunk([], usage=usage(event), timings=timings(event)))]
        return []

    def _said(self, said: Said) -> list[tuple[str, Any]]:
        row = said.row
        text = self.calls[row].add(said.text) if self.has_tools else said.text
        is_first = not self.told[row]
        self.told[row] += 1
        self.texts[row] += text
        new = [probabilities(self.service.tokenizer, one) for one in said.tokens] if self.asked.logprobs else []
        self.tokens[row] += new
        delta = ({"role": "assistant"} if is_first else {}) | {"content": text}
        choice = self._choice(row, delta, None, new)
        own = looks(self.prompt, said) if self.asked.reads else None
        return [("", self._chunk([choice], **({"attnpred": own} if own else {})))]

    def _ended(self, ended: Ended) -> list[tuple[str, Any]]:
        row, out = ended.row, []
        rest = self.calls[row].add("", is_last=True) if self.has_tools else ""
        self.texts[row] += rest
        calls = self.calls[row].found
        if rest or (calls and not self.told[row]):
            out.append(("", self._chunk([self._choice(row, {"role": "assistant", "content": rest}, None)])))
        if calls:
            deltas = [{"index": place} | call for place, call in enumerate(calls)]
            out.append(("", self._chunk([self._choice(row, {"tool_calls": deltas}, None)])))
        self.reasons[row] = "tool_calls" if calls and ended.reason == "stop" else ended.reason
        self.counters = counters(ended)
        if not self.told[row] and not out:
            out.append(("", self._chunk([self._choice(row, {"role": "assistant", "content": ""}, None)])))
        out.append(("", self._chunk([self._choice(row, {}, self.reasons[row])], attnpred=self.counters)))
        return out

    def _choice(self, row: int, delta: dict[str, Any], reason: str | None, new: Sequence[Any] = ()) -> dict[str, Any]:
        found = {"index": row, "delta": delta, "finish_reason": reason, "logprobs": None}
        return found | ({"logprobs": {"content": list(new), "refusal": None}} if new else {})

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        options = self.asked.stream_options
        found = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
        }
        return found | ({"usage": None} if options is not None and options.include_usage else {}) | more

    def body(self) -> dict[str, Any]:
        """Return the whole answer."""
        assert self.done is not None
        choices = []
        for row, text in enumerate(self.texts):
            calls = self.calls[row].found
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text if text or not calls else None,
                "refusal": None,
            }
            chances = {"content": self.tokens[row], "refusal": None} if self.asked.logprobs else None
            choices.append(
                {
                    "index": row,
                    "message": message | ({"tool_calls": calls} if calls else {}),
                    "finish_reason": self.reasons[row],
                    "logprobs": chances,
                }
            )
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
            "usage": usage(self.done),
            "timings": timings(self.done),
            "attnpred": self.counters,
        }


@router.post("/v1/chat/completions", responses=ANSWERS, response_model=None)
async def chat(request: Request, asked: ChatRequest) -> Response:
    """Answer a conversation; `documents` stand before its first question."""
    service, owner = service_of(request, asked.model)
    prompt, events, job = await prepared(service, owner, asked)
    answer = Answer(service, asked, prompt)
    await events.submit(service.engine, job)
    note(request, service, prompt, job)
    return await reply(request, events, answer, bool(asked.stream))


async def prepared(service: Service, owner: str, asked: ChatRequest) -> tuple[Prompt, Events, Job]:
    """Return prompt, events and job of a chat. Raises `FieldError` for what cannot be done."""
    asked.check_stream()
    drawing, most = asked.drawing(asked.alternatives), asked.most
    prompt = await prompt_of(service, owner, asked)
    events = Events()
    job = await run_in_threadpool(
        service.job,
        prompt,
        owner,
        events.tell,
        policy=asked.policy,
        budget=asked.budget,
        most=most,
        answers=asked.n or 1,
        stops=[*asked.stops, *service.prompts.stops],
        strips=service.prompts.turns.is_plain,
        drawing=drawing,
        looks=asked.reads,
    )
    return prompt, events, job
