"""What the gateway measures, under the field's names (those of vLLM, with our prefix)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """One model's counters in their own registry, so that two gateways in one process do not collide."""

    def __init__(self, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._model = model

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            labels = ["model_name"]
            return Histogram(f"expertmesh:{name}", help_text, labels, buckets=buckets, registry=registry)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"expertmesh:{name}", help_text, ["model_name", *labels], registry=registry)

        first_help = "Time from a request's arrival to its first token."
        self.first_token = histogram("time_to_first_token_seconds", first_help, FIRST_TOKEN_BUCKETS).labels(model)
        inter_help = "Time between two outputs of a request."
        self.inter_token = histogram("inter_token_latency_seconds", inter_help, TOKEN_BUCKETS).labels(model)
        whole_help = "Time from a request's arrival to its last token."
        self.whole = histogram("e2e_request_latency_seconds", whole_help, REQUEST_BUCKETS).labels(model)
        running = Gauge(
            "expertmesh:num_requests_running", "Requests being answered.", ["model_name"], registry=registry
        )
        self.running = running.labels(model)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self.generation_tokens = counter("generation_tokens", "Tokens generated.").labels(model)
        self._success = counter(
            "request_success", "Requests that ended without an error, by reason.", "finished_reason"
        )
        self._refused = counter("request_refused", "Requests that were refused or failed.", "reason")

    @contextmanager
    def request(self) -> Iterator[RequestClock]:
        clock = RequestClock(self)
        self.running.inc()
        try:
            yield clock
        except (GeneratorExit, asyncio.CancelledError):  # the client went away
            self.count_finished("abort")
            raise
        finally:
            self.running.dec()

    def count_finished(self, finish_reason: str) -> None:
        self._success.labels(self._model, finish_reason).inc()

    def count_refused(self, reason: str) -> None:
        self._refused.labels(self._model, reason).inc()

    def to_text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class RequestClock:
    """The times and tokens of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._last: float | None = None

    def count(self, num_prompt: int, num_new: int) -> None:
        """Books one output of the engine."""
        now = time.perf_counter()
        if self._last is None:
            self._metrics.prompt_tokens.inc(num_prompt)
            self._metrics.first_token.observe(now - self._start)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._metrics.generation_tokens.inc(num_new)
        self._last = now

    def finish(self, finish_reason: str) -> None:
        self._metrics.whole.observe(time.perf_counter() - self._start)
        self._metrics.count_finished(finish_reason)
