"""`attnpred serve` as it is started: it listens at once, is ready later, says why it cannot, and ends when it is told."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from attnpred.cli.main import main
from attnpred.serving.chain import BLOCK, SMALL
from tests.serving.server import wait_for

RUN = "import sys; from attnpred.cli.main import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Any]:
    """Start a server on a free port, and yield its process and its address."""
    command = [sys.executable, "-c", RUN, "serve", "demo", "--port=0", "--folder", str(folder), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("ready: "):
                yield process, line.split()[1].rstrip("/")
                break
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
def test_a_document_is_read_once_for_all_starts(tmp_path: Path) -> None:
    """Of what was read before a SIGKILL, every whole block is there after the next start; a SIGTERM ends with 0."""
    text = "The old clock stood in the hall. Nobody had wound it for years. " * 100
    with started(tmp_path) as (process, url):
        made = httpx.post(f"{url}/v1/documents?name=clock", content=text, headers={"content-type": "text/plain"}).json()
        wait_for(lambda: httpx.get(f"{url}/v1/documents/{made['id']}").json()["status"] == "ready", 60)
        large, rest = divmod(made["to_read_tokens"], BLOCK)
        wait_for(lambda: len(list(tmp_path.rglob("*.block"))) == large + rest // SMALL)  # they are written behind
        os.kill(process.pid, signal.SIGKILL)
    with started(tmp_path) as (process, url):
        (found,) = httpx.get(f"{url}/v1/documents").json()["data"]
        assert (found["id"], found["name"], found["status"]) == (made["id"], "clock", "ready")
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": "Who?"}],
            "documents": [made["id"]],
            "max_tokens": 3,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= found["to_read_tokens"] - SMALL > 512
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "demo", f"--port={taken.getsockname()[1]}", "--folder", str(tmp_path)]) == 2
    assert "expected to listen there: name another" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, "serve", str(tmp_path), "--port=0", "--folder", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("attnpred: got model"), done.stderr


def test_keys_are_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("short\n")
    assert main(["serve", "demo", "--port=0", "--key-file", str(tmp_path / "keys")]) == 2
    assert "got a key of 5 letters, expected at least 16" in capsys.readouterr().err
