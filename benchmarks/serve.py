"""The server over real sockets: streams over one document, beside `transformers serve` on the same model.

    attnpred bench serve [--model smollm2] [--streams 1 8 32] [--context 2048] [--engines attnpred transformers]

Theory first. A stream by itself reads all weights for every token; n streams in one step read them once. What is left per
stream is its own attention and its own selection, in Python and in kernels, so tokens/s grow with n until those are the
larger part. A document that was read before costs the bytes of its keys and values, not the time to compute them.

    first_cold_s      until the first token, the document unread; first_again_s: read before by this process
    first_restart_s   the same after a restart, from disk (attnpred alone)
    tokens_per_s      of all streams, from the first token of any to the last of all; gap_p50_ms, gap_p99_ms: between two
    first_p50_s       of the streams, which ask different things about the document at the same moment
    memory_mib        of the server while they run, less what it had before; admitted_mib: what they were admitted for

Answers are greedy. Each server is a process of its own, at an address of this machine. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks import options
from benchmarks.environment import environment

ENGINES = ("attnpred", "transformers")
RUN = "import sys; from attnpred.cli.main import main; sys.exit(main(sys.argv[1:]))"
STARTING = 300.0
QUESTIONS = ("Who", "Where", "When", "Why", "How", "Which of them", "What", "With whom")


@dataclass
class Stream:
    """One answer: when each piece of it came, seconds since it was asked for."""

    moments: list[float] = field(default_factory=list)
    began: float = 0.0

    def read(self, url: str, body: dict[str, Any]) -> None:
        """Ask, and note when pieces come."""
        self.began = time.perf_counter()
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=3600) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if choices[0].get("delta", {}).get("content"):
                        self.moments.append(time.perf_counter())

    @property
    def first(self) -> float:
        """Seconds until the first piece."""
        return self.moments[0] - self.began


@dataclass
class Server:
    """A server that runs. model: its name for clients."""

    process: "subprocess.Popen[bytes]"
    url: str
    model: str
    shelf: str = ""

    def hand_in(self, document: str) -> None:
        """Hand a document in where there is a shelf for it, unless it is there from before a restart."""
        if httpx.get(f"{self.url}/v1/documents", timeout=60).status_code != 200:
            return
        found = httpx.get(f"{self.url}/v1/documents", timeout=60).json()["data"]
        kind = {"content-type": "text/plain"}
        made = found[0] if found else httpx.post(f"{self.url}/v1/documents", content=document, headers=kind).json()
        self.shelf = made["id"]

    def body(self, document: str, question: str, tokens: int) -> dict[str, Any]:
        """Return a request about a document."""
        own = {"model": self.model, "max_tokens": tokens, "temperature": 0, "stream": True}
        if self.shelf:
            return own | {"messages": [{"role": "user", "content": question}], "documents": [self.shelf]}
        return own | {"messages": [{"role": "user", "content": f"{document}\n\nQuestion: {question}"}]}

    def memory(self) -> int:
        """Return the bytes that the process holds."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))

    def admitted(self) -> float:
        """Return the bytes that requests were admitted for; 0 where a server does not say."""
        answer = httpx.get(f"{self.url}/metrics", timeout=60)
        lines = answer.text.splitlines() if answer.is_success else []
        return next(
            (float(line.split()[1]) for line in lines if line.startswith("attnpred_cache_admitted_bytes ")), 0.0
        )


@contextmanager
def serving(engine: str, args: argparse.Namespace, folder: Path) -> Iterator[Server]:
    """Start a server, and end it."""
    port = _free_port()
    if engine == "attnpred":
        name = args.model
        more = ["--budget", f"{args.budget:g}", "--policy", args.policy, "--folder", str(folder)]
        command = [sys.executable, "-c", RUN, "serve", args.model, "--port", str(port), *more]
    else:
        from attnpred.hf import source_of

        name = source_of(args.model)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name, "--port", str(port)]
        command += ["--dtype", "float32", "--device", "cpu"]
    log = folder / f"{engine}.log"
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    server = Server(process, f"http://127.0.0.1:{port}", name)
    try:
        _wait(server, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as made:
        return int(made.getsockname()[1])


def _wait(server: Server, log: Path) -> None:
    until = time.monotonic() + STARTING
    while time.monotonic() < until and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/health", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")


def together(server: Server, document: str, count: int, tokens: int) -> dict[str, Any]:
    """Return the figures of `count` streams that begin at the same moment."""
    streams = [Stream() for _ in range(count)]
    bodies = [server.body(document, f"{QUESTIONS[i % len(QUESTIONS)]} {i}?", tokens) for i in range(count)]
    before, most, admitted = server.memory(), 0, 0.0
    threads = [
        threading.Thread(target=one.read, args=(server.url, body)) for one, body in zip(streams, bodies, strict=True)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, server.memory())
        admitted = max(admitted, server.admitted())
        time.sleep(0.25)
    told = [one for one in streams if one.moments]
    first, last = min(one.moments[0] for one in told), max(one.moments[-1] for one in told)
    gaps = sorted(1e3 * (b - a) for one in told for a, b in pairwise(one.moments)) or [0.0]
    pieces = sum(len(one.moments) for one in told)
    return {
        "streams": count,
        "answered": len(told),
        "tokens": pieces,
        "tokens_per_s": round(pieces / max(1e-6, last - first), 2),
        "seconds": round(last - min(one.began for one in streams), 2),
        "first_p50_s": round(statistics.median(one.first for one in told), 3),
        "gap_p50_ms": round(gaps[len(gaps) // 2], 1),
        "gap_p99_ms": round(gaps[min(len(gaps) - 1, len(gaps) * 99 // 100)], 1),
        "memory_mib": round(max(0, most - before) / (1 << 20)),
        "admitted_mib": round(admitted / (1 << 20)),
    }


def _first(server: Server, document: str) -> float:
    one = Stream()
    one.read(server.url, server.body(document, "Who is it?", 2))
    return round(one.first, 3)


def document_of(model: str, tokens: int) -> str:
    """Return so many tokens of the demo's book."""
    from transformers import AutoTokenizer

    from attnpred.evaluation.book import demo_book
    from attnpred.hf import source_of

    words: Any = AutoTokenizer.from_pretrained(source_of(model))
    return str(words.decode(words(demo_book(), add_special_tokens=False, verbose=False)["input_ids"][:tokens]))


def main(arguments: list[str] | None = None) -> None:
    parser = options.Options(prog="attnpred bench serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--streams", type=options.count, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=options.count, default=2048)
    parser.add_argument("--tokens", type=options.count, default=64)
    parser.add_argument("--budget", type=options.budget, default=1024)
    parser.add_argument("--policy", default="predicted")
    parser.add_argument("--out", type=Path, help="write the last line there too")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    args = parser.checked(arguments)
    say: Callable[[str], None] = (lambda line: None) if args.json else (lambda line: print(line, flush=True))
    document, rows = document_of(args.model, args.context), []
    with tempfile.TemporaryDirectory(prefix="attnpred-bench-") as place:
        for engine in args.engines:
            shared: dict[str, Any] = {"engine": engine, "model": args.model, "context": args.context}
            folder = Path(place) / engine
            with serving(engine, args, folder) as server:
                server.hand_in(document)
                shared["first_cold_s"], shared["first_again_s"] = _first(server, document), _first(server, document)
                say(f"{engine}: first token {shared['first_cold_s']} s, read before {shared['first_again_s']} s")
                for count in args.streams:
                    rows.append(shared | together(server, document, count, args.tokens))
                    say("  " + ", ".join(f"{name} {rows[-1][name]}" for name in ("streams", "tokens_per_s", "first_p50_s", "gap_p50_ms", "gap_p99_ms", "memory_mib", "admitted_mib")))  # fmt: skip
            if engine == "attnpred":
                with serving(engine, args, folder) as server:
                    server.hand_in(document)
                    again = _first(server, document)
                rows = [row | {"first_restart_s": again} for row in rows]
                say(f"  after a restart {again} s")
    line = json.dumps(
        {"rows": rows, "tokens": args.tokens, "budget": args.budget, "policy": args.policy} | environment()
    )
    options.write_line(args, line)
    print(line)


if __name__ == "__main__":
    main()
