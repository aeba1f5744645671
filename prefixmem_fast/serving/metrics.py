"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

OUTCOMES = (
    "answered",
    "refused",
    "queue_full",
    "starting",
    "stopping",
    "worker_died",
    "engine_failed",
    "too_late",
    "client_gone",
    "failed",
)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def made(kind, name: str, text: str, **options):
            return kind(f"prefixmem_{name}", text, registry=self.registry, **options)

        self._requests = made(Counter, "requests", "Requests for recommendations, by outcome.", labelnames=["outcome"])
        self._seconds = made(Histogram, "request_seconds", "From the request to its answer.", buckets=_SECONDS)
        self._batches = made(Histogram, "batch_size", "Requests that the engine took together.", buckets=_SIZES)
        self._queue = made(Gauge, "queue_length", "Requests that wait for the engine.")
        self._ready = made(Gauge, "engine_ready", "1 while the engine is loaded and answers.")
        self._restarts = made(Gauge, "worker_restarts", "Engine processes started in place of one that ended.")
        for outcome in OUTCOMES:
            self._requests.labels(outcome)

    def watch(self, queue: Callable[[], int], ready: Callable[[], bool], restarts: Callable[[], int]) -> None:
        """Read these whenever Prometheus asks."""
        for gauge, value in ((self._queue, queue), (self._ready, ready), (self._restarts, restarts)):
            gauge.set_function(value)

    def batch(self, size: int) -> None:
        self._batches.observe(size)

    def request(self, outcome: str, seconds: float) -> None:
        self._requests.labels(outcome).inc()
        if outcome == "answered":
            self._seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
