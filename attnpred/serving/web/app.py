"""`make_app`: the endpoints, the page and the guard before them, around one service. `attnpred serve` runs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from attnpred.serving.service import Service
from attnpred.serving.web import about, chat, completions, errors, page, responses, shelf
from attnpred.serving.web.guard import Guard, Rules
from attnpred.serving.web.meter import Meter

PATIENCE = 2.0
"""Seconds that answers get when the server ends; it has waited for connections before."""


class _App(FastAPI):
    """An application whose description leaves out what never happens: FastAPI's own 422, in whose place is a 400."""

    def openapi(self) -> dict[str, Any]:
        """Return the description of the interface."""
        found: dict[str, Any] = super().openapi()
        for path in found.get("paths", {}).values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        return found


def make_app(service: Service, rules: Rules) -> Guard:
    """Return the application. Loading the service is the caller's; closing it happens when the application ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close(PATIENCE)

    app = _App(
        title="attnpred serve",
        version=version("attnpred"),
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service, app.state.meter = service, Meter(service)
    service.watch = app.state.meter.count
    errors.install(app)
    for part in (about, chat, completions, responses, shelf, page):
        app.include_router(part.router)
    return Guard(app, rules)
