"""`Meter`: what Prometheus asks for. Its registry is its own, and what the engine knows is read when it is asked for."""

from collections.abc import Iterable
from typing import final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from attnpred.serving.job import Done, Event, Failed
from attnpred.serving.service import Service

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)


@final
class _State:
    """A collector of what is so now."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield gauges."""
        if not self.service.is_ready:
            return
        engine = self.service.engine
        for name, words, value in (
            ("attnpred_requests_running", "Requests that are read or answered.", engine.running),
            ("attnpred_requests_waiting", "Requests in the queue.", engine.queued),
            ("attnpred_cache_admitted_bytes", "Bytes that running requests were admitted for.", engine.admission.taken),
            ("attnpred_cache_limit_bytes", "Bytes that they may take together.", engine.admission.limit),
            ("attnpred_blocks_memory_bytes", "Bytes of blocks that are kept in memory.", engine.store.held_bytes),
            ("attnpred_blocks_disk_bytes", "Bytes of blocks that are kept on disk.", engine.store.stored_bytes()),
        ):
            yield GaugeMetricFamily(name, words, value)


@final
class Meter:
    """Counts what requests came to."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_State(service))
        tokens = Counter("attnpred_tokens", "Tokens.", ["kind"], registry=self._registry)
        self._tokens = {kind: tokens.labels(kind) for kind in ("prompt", "reused", "generated")}
        ended = Counter("attnpred_requests", "Requests that ended.", ["outcome"], registry=self._registry)
        self._ended = {kind: ended.labels(kind) for kind in ("done", "failed")}
        self._first = Histogram(
            "attnpred_first_token_seconds", "Until the first token.", buckets=SECONDS, registry=self._registry
        )
        self._each = Histogram(
            "attnpred_token_seconds", "Of a token, mean of an answer.", buckets=SECONDS, registry=self._registry
        )

    def count(self, event: Event, since: float) -> None:
        """Take in an event, `since` seconds after its request came."""
        if isinstance(event, Done):
            self._ended["done"].inc()
            self._tokens["prompt"].inc(event.prompt)
            self._tokens["reused"].inc(event.reused)
            self._tokens["generated"].inc(event.new)
            if event.new:
                self._first.observe((event.waited_ms + event.prompt_ms) / 1e3)
                self._each.observe(event.new_ms / 1e3 / event.new)
        elif isinstance(event, Failed):
            self._ended["failed"].inc()

    def text(self) -> str:
        """Return all of it in Prometheus' format."""
        return generate_latest(self._registry).decode()
