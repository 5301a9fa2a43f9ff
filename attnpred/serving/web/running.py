"""`run`: a server in the foreground. It listens at once, and answers 503 until the model is loaded, in a thread of its own.

What goes wrong while the model is loaded ends the server, and is the error of `run`. An interrupt, or SIGTERM, lets answers
that are written go on for some seconds, and ends then.
"""

import logging
import signal
import socket
import sys
import threading
from contextlib import suppress

import uvicorn

from attnpred.errors import ConfigError
from attnpred.serving.service import Plan, Service
from attnpred.serving.web.app import make_app
from attnpred.serving.web.guard import Rules

STOPPING = 10
"""Seconds that connections get when the server stops."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(256)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"got {error.strerror} at {host} port {port}, expected to listen there: name another"
        ) from None
    return made


def run(plan: Plan, rules: Rules, host: str, port: int) -> None:
    """Serve until somebody stops it. Raises what loading raises."""
    made = listen(host, port)
    port = made.getsockname()[1]
    service = Service(plan)
    config = uvicorn.Config(
        make_app(service, rules),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOPPING,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=1 << 16,
        ws="none",
        http="h11",
    )
    server = uvicorn.Server(config)
    failures: list[BaseException] = []

    def load() -> None:
        try:
            service.load()
            print(
                f"ready: http://{_shown(host)}:{port}/ (page), /v1 (OpenAI's API); Ctrl-C stops",
                file=sys.stderr,
                flush=True,
            )
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    log_to_stderr()
    print(f"loading {plan.model} ...", file=sys.stderr, flush=True)
    loading = threading.Thread(target=load, name="attnpred loading", daemon=True)
    loading.start()
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn raises it again when it has ended
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[made])
    finally:
        signal.signal(signal.SIGTERM, earlier)
    if failures:
        raise failures[0]


def log_to_stderr() -> None:
    """Let requests say their line on stderr."""
    logger = logging.getLogger("attnpred.serve")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it says at length what is damaged


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
