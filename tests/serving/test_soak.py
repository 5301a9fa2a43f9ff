"""A minute of clients that behave badly: they go in the middle, read slowly, ask for nonsense, send too much.

`SOAK_SECONDS=600 python -m pytest tests/serving/test_soak.py` takes ten. Afterwards nothing of it is left, and every greedy
answer in between was the one that it is alone.
"""

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from attnpred.serving.service import Plan
from tests.serving.server import SMALL, STORY, Running, serving

SECONDS = float(os.environ.get("SOAK_SECONDS", "40"))
CLIENTS = 6
KNOWN = [{"model": "demo", "prompt": STORY * n, "max_tokens": 6, "temperature": 0} for n in (1, 6, 14)]


class Client:
    """Does what it likes until the time is over. answers: status to how many."""

    def __init__(self, server: Running, seed: int, wanted: list[str], until: float) -> None:
        self.server, self.chance, self.wanted, self.until = server, random.Random(seed), wanted, until
        self.answers: Counter[str] = Counter()
        self.faults: list[str] = []
        self.ways = [self.ask, self.ask, self.leave_a_stream, self.leave_at_once, self.read_slowly, self.nonsense, self.too_much, self.document, self.half]  # fmt: skip

    def run(self) -> None:
        while time.monotonic() < self.until:
            way = self.chance.choice(self.ways)
            try:
                way()
            except httpx.TimeoutException as error:
                self.faults.append(f"{way.__name__}: {error!r}")
            except (httpx.TransportError, OSError):
                self.answers["closed"] += 1

    def post(self, path: str, **more: Any) -> httpx.Response:
        found = httpx.post(self.server.url + path, timeout=60, **more)
        self.answers[str(found.status_code)] += 1
        if found.status_code >= 500:
            self.faults.append(found.text)
        return found

    def ask(self) -> None:
        number = self.chance.randrange(len(KNOWN))
        found = self.post("/v1/completions", json=KNOWN[number])
        if found.status_code == 200 and found.json()["choices"][0]["text"] != self.wanted[number]:
            self.faults.append(f"another answer: {found.json()['choices'][0]['text']}")

    def leave_a_stream(self) -> None:
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": STORY * self.chance.randrange(30)}],
            "stream": True,
        }
        with httpx.stream("POST", f"{self.server.url}/v1/chat/completions", json=body, timeout=60) as stream:
            for _, _ in zip(range(self.chance.randrange(12)), stream.iter_lines(), strict=False):
                pass

    def leave_at_once(self) -> None:
        body = json.dumps(KNOWN[0] | {"max_tokens": 4000}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.server.port), 5) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(self.chance.random() / 5)

    def read_slowly(self) -> None:
        body = KNOWN[0] | {"stream": True, "max_tokens": 20}
        with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=60) as stream:
            for _ in stream.iter_raw(16):
                time.sleep(0.01)

    def nonsense(self) -> None:
        body = self.chance.choice(
            [b"", b"{", b"[]", b"\xff" * 99, b'{"model": 3}', b"[" * 20_000, b'{"model":"demo","prompt":[99999999]}']
        )
        found = self.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert found.status_code in (400, 422)

    def too_much(self) -> None:
        self.post("/v1/documents", content=b"x" * (1 << 18), headers={"content-type": "text/plain"})

    def document(self) -> None:
        text = STORY * self.chance.randrange(1, 30) + str(self.chance.randrange(3))
        found = self.post("/v1/documents", content=text, headers={"content-type": "text/plain"})
        if found.status_code == 200:
            time.sleep(self.chance.random() / 4)
            httpx.delete(f"{self.server.url}/v1/documents/{found.json()['id']}", timeout=60)

    def half(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port), 5) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
            time.sleep(self.chance.random() / 10)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_nothing_is_left_of_a_minute_of_bad_clients(tmp_path: Path) -> None:
    plan = Plan("demo", settings=SMALL, folder=tmp_path, streams=6, waiting=4, tokens=40, block_memory=1 << 24)
    with serving(plan, body=1 << 16) as server:
        wanted = [
            httpx.post(f"{server.url}/v1/completions", json=one, timeout=60).json()["choices"][0]["text"]
            for one in KNOWN
        ]
        threads, files = threading.active_count(), open_files()
        until = time.monotonic() + SECONDS
        clients = [Client(server, seed, wanted, until) for seed in range(CLIENTS)]
        running = [threading.Thread(target=client.run) for client in clients]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        server.wait_until_idle()
        assert [fault for client in clients for fault in client.faults] == []
        answers = sum((client.answers for client in clients), Counter[str]())
        assert answers["200"] > 10 and answers["400"] and answers["413"], answers
        assert httpx.get(f"{server.url}/v1/documents").json()["data"] == []
        until = time.monotonic() + 20
        while threading.active_count() > threads + 3 or open_files() > files + 3:  # of the pool that serves files
            assert time.monotonic() < until, (threading.enumerate(), open_files() - files)
            time.sleep(0.1)
        assert server.service.engine.store.held_bytes <= 1 << 24
