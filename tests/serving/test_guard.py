"""Who may ask: by which name the server is called, from which page, with which key; and what is too much."""

import json
import logging
import socket
from collections.abc import Iterator

import httpx
import pytest

from attnpred.serving.service import Plan
from tests.serving.server import SMALL, Running, serving, wait_for
from tests.serving.server import STORY as SENTENCE

KEYS = ("first-key-of-sixteen-letters", "second-key-of-sixteen-letters")
STORY = SENTENCE * 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    plan = Plan("demo", settings=SMALL, folder=tmp_path_factory.mktemp("serve"), document_bytes=8000)
    with serving(plan, KEYS, body=1 << 16, seconds=20) as found:
        yield found


def headers(key: str = KEYS[0], **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} | more


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.", "", "[::2]"]
)
def test_another_name_is_refused(server: Running, host: str) -> None:
    """A page whose name was made to point here (DNS rebinding) sends its own name."""
    found = httpx.get(f"{server.url}/v1/models", headers=headers(host=host))
    assert found.status_code == 403 and "this server was started for" in found.json()["error"]["message"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"])
def test_a_page_from_elsewhere_is_refused(server: Running, origin: str) -> None:
    found = httpx.post(f"{server.url}/v1/documents", content="A text.", headers=headers(origin=origin))
    assert found.status_code == 403 and "access-control-allow-origin" not in found.headers
    assert httpx.get(f"{server.url}/v1/models", headers=headers(origin=server.url)).status_code == 200


@pytest.mark.parametrize("key", ["first", KEYS[0] + "x", KEYS[0][:-1], "é"])
def test_a_key_is_needed(server: Running, key: str) -> None:
    for path in ("/v1/models", "/v1/documents", "/metrics", "/openapi.json"):
        found = httpx.get(server.url + path, headers=[("authorization", f"Bearer {key}".encode())])
        assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/").status_code == 200


@pytest.mark.slow
def test_each_key_has_what_is_its_own(server: Running) -> None:
    """Documents, and also what was read: neither the counters nor the time tell of another key's."""

    def cached(key: str) -> int:
        body = {"model": "demo", "prompt": STORY, "max_tokens": 1, "temperature": 0}
        found = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers(key), timeout=60).json()
        assert "timings" in found, found
        return int(found["timings"]["cache_n"])

    assert [cached(KEYS[0]), cached(KEYS[1])] == [0, 0] and cached(KEYS[0]) == cached(KEYS[1]) > 0
    kind = {"content-type": "text/plain"}
    made = httpx.post(f"{server.url}/v1/documents", content=STORY, headers=headers(**kind)).json()
    listed = [httpx.get(f"{server.url}/v1/documents", headers=headers(key)).json()["data"] for key in KEYS]
    assert [one["id"] for one in listed[0]] == [made["id"]] and listed[1] == []
    for method in ("GET", "DELETE"):
        found = httpx.request(method, f"{server.url}/v1/documents/{made['id']}", headers=headers(KEYS[1]))
        assert found.status_code == 404
    body = {"model": "demo", "messages": [{"role": "user", "content": "Who?"}], "documents": [made["id"]]}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers(KEYS[1])).status_code == 404
    httpx.delete(f"{server.url}/v1/documents/{made['id']}", headers=headers()).raise_for_status()


@pytest.mark.parametrize("name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "doc-" + "0" * 24, "doc-x", "%00"])
def test_names_never_touch_paths(server: Running, name: str) -> None:
    for method in ("GET", "DELETE"):
        found = httpx.request(method, f"{server.url}/v1/documents/{name}", headers=headers())
        assert found.status_code in (404, 405), found.text


def test_bodies_and_documents_have_limits(server: Running) -> None:
    kind = {"content-type": "text/plain"}
    found = httpx.post(f"{server.url}/v1/documents", content=b"x" * (1 << 17), headers=headers(**kind))
    assert found.status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(1 << 7):
            yield b"x" * 1024

    found = httpx.post(f"{server.url}/v1/documents", content=parts(), headers=headers(**kind))
    assert found.status_code == 413 and found.json()["error"]["type"] == "invalid_request_error"
    found = httpx.post(f"{server.url}/v1/documents", content="word " * 3000, headers=headers(**kind))
    assert found.status_code == 400 and "bytes of documents, expected at most 8,000" in found.json()["error"]["message"]


def test_what_is_no_http_is_refused(server: Running) -> None:
    for data in (
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
            connection.sendall(data)
            answer = connection.recv(1 << 16)
            assert answer.split()[1] in (b"400", b"403", b"413"), answer


def test_nothing_of_the_page_comes_from_elsewhere(server: Running) -> None:
    found = httpx.get(f"{server.url}/").headers
    assert "default-src 'none'" in found["content-security-policy"] and "unsafe" not in found["content-security-policy"]
    assert found["x-content-type-options"] == "nosniff" and found["x-frame-options"] == "DENY"


def test_the_log_has_a_line_for_each_request_and_no_word_of_it(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "attnpred.serve"):
        body = {"model": "demo", "messages": [{"role": "user", "content": "SECRETWORD"}], "max_tokens": 2}
        found = httpx.post(f"{server.url}/v1/chat/completions?q=SECRETWORD", json=body, headers=headers(), timeout=60)
        wait_for(lambda: any(found.headers["x-request-id"] in line for line in caplog.messages))  # after the answer
        refused = httpx.get(f"{server.url}/v1/documents/SECRETWORD", headers=headers("SECRETWORD"))
        wait_for(lambda: any(refused.headers["x-request-id"] in line for line in caplog.messages))
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "attnpred.serve"][-2:]
    assert [line["status"] for line in lines] == [200, 401] and lines[0]["path"] == "/v1/chat/completions"
    assert lines[0]["request"] == found.headers["x-request-id"] and lines[0]["prompt_tokens"] > 0
    assert "SECRETWORD" not in caplog.text
