"""A server as it really runs, uvicorn over a socket, in a thread of this process; and a tokenizer with a template for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from attnpred.config import CacheConfig
from attnpred.serving.prompts import Prompts
from attnpred.serving.service import Plan, Service
from attnpred.serving.web.app import make_app
from attnpred.serving.web.guard import Rules
from attnpred.serving.web.running import listen
from tests.serving.test_turns import CHATML

SMALL = CacheConfig(budget=128)
STORY = "The old clock stood in the hall. Nobody had wound it for years, and yet it was never wrong by a minute. "
LOCAL = frozenset(("127.0.0.1", "localhost"))


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something is so. For what tells nobody when it is."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"it was not so within {seconds:g} s"
        time.sleep(0.01)


def is_idle(service: Service) -> bool:
    """Return whether nothing runs or waits, and all memory was given back."""
    engine = service.engine
    return not (engine.running or engine.queued or engine.admission.taken)


@dataclass
class Running:
    """url: without a path."""

    service: Service
    url: str
    port: int

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Wait for what runs to end."""
        wait_for(lambda: is_idle(self.service), seconds)


def loaded(service: Service, template: str | None = CHATML) -> Service:
    """Return the service, loaded, with a chat template."""
    service.load()
    service.tokenizer.chat_template = template
    service.prompts = Prompts(service.tokenizer)
    service.ends = service._ends()
    return service


@contextmanager
def serving(
    plan: Plan, keys: tuple[str, ...] = (), *, template: str | None = CHATML, **rules: Any
) -> Iterator[Running]:
    """Serve on a free port."""
    service, made = loaded(Service(plan), template), listen("127.0.0.1", 0)
    port = made.getsockname()[1]
    app = make_app(service, Rules(**({"hosts": LOCAL, "keys": keys} | rules)))
    config = uvicorn.Config(app, log_config=None, access_log=False, http="h11", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [made]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Running(service, f"http://127.0.0.1:{port}", port)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
