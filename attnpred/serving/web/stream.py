"""From the engine's events to an answer on the wire, whole or as server-sent events; and away from it, when nobody listens.

The engine tells its events in its own thread; `Events` brings them to this one. A client that goes, before the first
token or between two, is noticed at once, and its request cancelled.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, final

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from attnpred.serving.engine import Engine
from attnpred.serving.job import LAST, Event, Failed, Job
from attnpred.serving.web.errors import body_of

QUIET = 10.0
"""Seconds without a word, after which a comment keeps the connection alive."""


@final
class Events:
    """The events of one job. Give `tell` to the job, and submit it by `submit`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._engine: Engine | None = None
        self._job: Job | None = None

    def tell(self, event: Event) -> None:
        """Take an event, in any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and everybody is gone
            if self._job is not None:
                self._job.is_cancelled = True

    async def submit(self, engine: Engine, job: Job) -> None:
        """Hand the job in. Raises what `Engine.submit` does."""
        self._engine, self._job = engine, job
        await run_in_threadpool(engine.submit, job)

    def cancel(self) -> None:
        """Nobody listens any more."""
        if self._engine is not None and self._job is not None:
            self._engine.cancel(self._job)

    async def each(self, quiet: float | None = None) -> AsyncIterator[Event | None]:
        """Yield all events; None after each `quiet` seconds without one. Raises the error of a job that failed."""
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), quiet)
            except (TimeoutError, asyncio.TimeoutError):
                yield None
                continue
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, LAST):
                return


class Answered(Protocol):
    """Collects the events of a job."""

    def chunks(self, event: Event) -> list[tuple[str, Any]]:
        """Take in an event; return what a stream says of it: the names of server-sent events, and their data."""

    def body(self) -> dict[str, Any]:
        """Return the whole answer, after the last event."""


async def reply(request: Request, events: Events, answer: Answered, is_streamed: bool, end: str = "[DONE]") -> Response:
    """Return the answer to a request whose job is handed in. Raises the error of the job, if nothing is streamed."""
    if is_streamed:
        return EventStream(events, answer.chunks, end)

    async def listen() -> None:
        async for event in events.each():
            assert event is not None
            answer.chunks(event)

    is_there = await _while_there(listen(), request.receive, events)
    return JSONResponse(answer.body()) if is_there else Response(status_code=499)


async def _while_there(work: Coroutine[Any, Any, None], receive: Receive, events: Events) -> bool:
    """Do `work` while the client is there; return False, with the job cancelled, if it goes before the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        working.result()
        return True
    finally:
        if not working.done() or working.cancelled() or working.exception() is not None:
            events.cancel()
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


@final
class EventStream(Response):
    """Server-sent events: what `chunks` makes of each event of the job, and at the end `end`."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, chunks: Callable[[Event], list[tuple[str, Any]]], end: str = "[DONE]") -> None:
        self.events, self.chunks, self.last = events, chunks, end
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(OSError):  # the client went while something was sent
            await _while_there(self._tell(send), receive, self.events)

    async def _tell(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for text in self._texts():
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _texts(self) -> AsyncIterator[str]:
        """Yield what is to be sent. An error of the job is the last of it, whatever it is: the status is sent already."""
        try:
            async for event in self.events.each(QUIET):
                if event is None:
                    yield ": still here\n\n"
                elif text := "".join(_event(name, data) for name, data in self.chunks(event)):
                    yield text
            if self.last:
                yield f"data: {self.last}\n\n"
        except Exception as error:
            yield _event("error" if not self.last else "", body_of(error))


def _event(name: str, data: Any) -> str:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
