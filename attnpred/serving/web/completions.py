"""POST /v1/completions: a text is continued as it is, without a chat template."""

import secrets
import time
from typing import Any, final

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from attnpred.errors import ConfigError
from attnpred.serving.drawing import Drawn
from attnpred.serving.job import Done, Ended, Event, FieldError, Said
from attnpred.serving.prompts import Prompt
from attnpred.serving.service import Service
from attnpred.serving.web.documented import ANSWERS
from attnpred.serving.web.serving import note, service_of
from attnpred.serving.web.shapes import counters, piece, timings, usage
from attnpred.serving.web.stream import Events, reply
from attnpred.serving.web.wire import CompletionRequest

router = APIRouter()

USUAL = 16
"""Tokens of a completion for which nobody says how many (OpenAI's)."""


@final
class Completion:
    """Collects one completion, and makes the chunks of its stream."""

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self.service, self.asked = service, asked
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        rows = range(asked.n or 1)
        self.texts = ["" for _ in rows]
        self.reasons: list[str | None] = [None for _ in rows]
        self.tokens: list[list[tuple[int, Drawn]]] = [[] for _ in rows]
        self.counters: dict[str, Any] = {}
        self.done: Done | None = None

    def chunks(self, event: Event) -> list[tuple[str, Any]]:
        """Take in an event; return what a stream says of it."""
        if isinstance(event, Said):
            new = [(len(self.texts[event.row]), drawn) for drawn in event.tokens]
            self.texts[event.row] += event.text
            self.tokens[event.row] += new
            return [("", self._body([self._choice(event.row, event.text, None, new)]))]
        if isinstance(event, Ended):
            self.reasons[event.row], self.counters = event.reason, counters(event)
            return [("", self._body([self._choice(event.row, "", event.reason, [])], attnpred=self.counters))]
        if isinstance(event, Done):
            self.done = event
            options = self.asked.stream_options
            if options is not None and options.include_usage:
                return [("", self._body([], usage=usage(event), timings=timings(event)))]
        return []

    def _choice(self, row: int, text: str, reason: str | None, tokens: list[tuple[int, Drawn]]) -> dict[str, Any]:
        chances = self._chances(tokens) if self.asked.logprobs is not None else None
        return {"index": row, "text": text, "finish_reason": reason, "logprobs": chances}

    def _chances(self, tokens: list[tuple[int, Drawn]]) -> dict[str, Any]:
        words = self.service.tokenizer
        found = [(place, one.chance, one.alternatives) for place, one in tokens if one.chance is not None]
        return {
            "tokens": [piece(words, chance.token) for _, chance, _ in found],
            "token_logprobs": [chance.logprob for _, chance, _ in found],
            "top_logprobs": [{piece(words, one.token): one.logprob for one in others} for _, _, others in found],
            "text_offset": [place for place, _, _ in found],
        }

    def _body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        found = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.asked.model}
        return found | {"choices": choices} | more

    def body(self) -> dict[str, Any]:
        """Return the whole answer."""
        assert self.done is not None
        choices = [self._choice(row, text, self.reasons[row], self.tokens[row]) for row, text in enumerate(self.texts)]
        more = {"usage": usage(self.done), "timings": timings(self.done), "attnpred": self.counters}
        return self._body(choices, **more)


@router.post("/v1/completions", responses=ANSWERS, response_model=None)
async def complete(request: Request, asked: CompletionRequest) -> Response:
    """Continue a text, or a list of tokens."""
    service, owner = service_of(request, asked.model)
    asked.check_stream()
    if asked.reads:
        raise FieldError("reads", "got reads, expected it with documents, in /v1/chat/completions")
    prompt = await run_in_threadpool(_prompt, service, asked)
    events = Events()
    job = await run_in_threadpool(
        service.job,
        prompt,
        owner,
        events.tell,
        policy=asked.policy,
        budget=asked.budget,
        most=asked.max_tokens or USUAL,
        answers=asked.n or 1,
        stops=asked.stops,
        where="prompt",
        drawing=asked.drawing(asked.logprobs),
    )
    answer = Completion(service, asked)
    await events.submit(service.engine, job)
    note(request, service, prompt, job)
    return await reply(request, events, answer, bool(asked.stream))


def _prompt(service: Service, asked: CompletionRequest) -> Prompt:
    """Return the prompt. Raises `FieldError`."""
    given: Any = asked.prompt
    if isinstance(given, list) and given and isinstance(given[0], str | list):
        if len(given) > 1:
            raise FieldError("prompt", f"got {len(given)} prompts, expected one: ask for each by itself")
        given = given[0]
    if isinstance(given, str):
        try:
            return Prompt(given, *service.prompts.tokens(given, special=True))
        except ConfigError as error:
            raise FieldError("prompt", error) from None
    size = len(service.tokenizer)
    if any(not 0 <= token < size for token in given):
        raise FieldError("prompt", f"got a token that is none, expected numbers from 0 to {size - 1}")
    return Prompt("", list(given), [])
