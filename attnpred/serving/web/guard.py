"""`Guard`: what every request passes before anything looks at it, whatever it asks for.

    host      the names by which this server may be called: a page of somebody else's, whose name was made to point here
              (DNS rebinding), is none of them
    origin    a page of another server may not write here
    key       compared in constant time with every key there is; the page itself is free to all, for it holds nothing
    body      of a limited size
    time      of the whole answer, however slowly it is taken
    headers   nothing of the page comes from elsewhere, nothing is guessed, framed or kept

Each request has an id, in its answer and in its one line of the log: JSON, with no word of what was said.
"""

import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from anyio import fail_after
from starlette.exceptions import HTTPException

from attnpred.serving.service import owner_of
from attnpred.serving.web.errors import error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("attnpred.serve")

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
FREE = ("/", "/health", "/page/")
"""What needs no key; a path that ends in a slash stands for all below it."""


@final
@dataclass(frozen=True, slots=True)
class Rules:
    """hosts: names in the header Host; None takes any. keys: none asks for no key. body: bytes. seconds: of an answer."""

    hosts: frozenset[str] | None
    keys: Sequence[str] = ()
    body: int = 1 << 26
    seconds: float = 660.0


@final
class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, rules: Rules) -> None:
        self.app, self.rules = app, rules
        self._keys = [(hashlib.sha256(key.encode()).digest(), owner_of(key)) for key in rules.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, name, status, size = time.monotonic(), f"req-{secrets.token_hex(8)}", 0, 0
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        scope.setdefault("state", {})["request"] = name

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {key.lower() for key, _ in message.get("headers", [])}
                more = {"x-request-id": name} | {k: v for k, v in HEADERS.items() if k.encode() not in given}
                message = dict(message)
                message["headers"] = [*message.get("headers", []), *((k.encode(), v.encode()) for k, v in more.items())]
            await send(message)

        async def body() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.rules.body:
                raise HTTPException(413, f"got a body of more than {self.rules.body:,} bytes, expected a smaller one")
            return message

        ended = "answered"
        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await _refuse(answer, *refusal)
            else:
                with fail_after(self.rules.seconds):
                    await self.app(scope, body, answer)
        except TimeoutError:
            ended = "too slow"
            if not status:
                await _refuse(answer, 504, "got no more time for this request, expected it to end earlier")
        finally:
            line = {
                "request": name,
                "method": scope["method"],
                "path": _known_path(scope),
                "status": status,
                "ms": round(1e3 * (time.monotonic() - began), 1),
                "bytes_in": size,
                "ended": ended,
            } | scope["state"].get("log", {})
            logger.info(json.dumps(line))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and words where a request may not pass; note in its state whose it is."""
        host = headers.get("host", "")
        if self.rules.hosts is not None and _name_of(host) not in self.rules.hosts:
            return 403, f"got host {host[:60]!r}, expected one that this server was started for (--allow-host)"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, f"got a request from {origin[:60]!r}, expected one from the page of this server"
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.rules.body:
            return 413, f"got a body of {length[:20]} bytes, expected at most {self.rules.body:,}"
        scope["state"]["owner"] = owner_of(None)
        if not self._keys or is_free(scope["path"]):
            return None
        given = hashlib.sha256(headers.get("authorization", "").removeprefix("Bearer ").encode()).digest()
        found = [owner for key, owner in self._keys if hmac.compare_digest(key, given)]
        if not found:
            return 401, "got no key that this server knows, expected one: Authorization: Bearer KEY"
        scope["state"]["owner"] = found[0]
        return None


def is_free(path: str) -> bool:
    """Return whether a path needs no key."""
    return any(path == one or (len(one) > 1 and one.endswith("/") and path.startswith(one)) for one in FREE)


def _name_of(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _known_path(scope: Scope) -> str:
    """Return the route of a request, never what a client has put into a path."""
    return getattr(scope.get("route"), "path", "") or "unknown"


async def _refuse(send: Send, status: int, words: str) -> None:
    data = json.dumps(error_body(status, words)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
