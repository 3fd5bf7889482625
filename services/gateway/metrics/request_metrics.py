"""A `RequestMetrics` holds the gateway's metrics; a `RequestClock` measures one choice and writes the request log.

The metrics have vLLM's names, with the prefix `expertmesh:`, and vLLM's buckets.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.gateway.chat.text_delta import TextDelta

log = logging.getLogger("expertmesh.requests")  # the request log: one line per choice, with one JSON object

# Upper bounds of histogram buckets, in seconds; the bounds of LENGTH_BUCKETS are numbers of tokens.
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_BUCKETS = (  # the first three bounds do not exist in vLLM
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
LENGTH_BUCKETS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))


class RequestMetrics:
    """A `RequestMetrics` holds the request metrics of one served model.

    Each `RequestMetrics` has its own Prometheus registry, because the metrics of two gateways in one process would
    collide in a shared registry.
    """

    def __init__(self, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._model = model

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            labels = ["model_name"]
            return Histogram(f"expertmesh:{name}", help_text, labels, buckets=buckets, registry=registry).labels(model)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"expertmesh:{name}", help_text, ["model_name", *labels], registry=registry)

        first_help = "Time from a request's arrival to its first token."
        self.first_token = histogram("time_to_first_token_seconds", first_help, FIRST_TOKEN_BUCKETS)
        inter_help = "Time between two outputs of a request."
        self.inter_token = histogram("inter_token_latency_seconds", inter_help, TOKEN_BUCKETS)
        whole_help = "Time from a request's arrival to its last token."
        self.whole = histogram("e2e_request_latency_seconds", whole_help, REQUEST_BUCKETS)
        queue_help = "Time from a request's arrival at the engine to the first step that computed it."
        self.queue = histogram("request_queue_time_seconds", queue_help, REQUEST_BUCKETS)
        self.prompt_lens = histogram("request_prompt_tokens", "Tokens of each prompt.", LENGTH_BUCKETS)
        self.answer_lens = histogram("request_generation_tokens", "Tokens generated for each request.", LENGTH_BUCKETS)
        running = Gauge(
            "expertmesh:num_requests_open",
            "Requests being answered, from arrival on.",
            ["model_name"],
            registry=registry,
        )
        self.running = running.labels(model)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts that were not computed again.").labels(
            model
        )
        self.generation_tokens = counter("generation_tokens", "Tokens generated.").labels(model)
        self._cache = counter("prefix_cache_requests", "Requests by what the prefix cache did for them.", "reason")
        self._success = counter(
            "request_success", "Requests that ended without an error, by reason.", "finished_reason"
        )
        self._resumed = counter("requests_resumed", "Requests that lost their backbone and went on at another.").labels(
            model
        )
        pause_help = "Time between two outputs of a request that lost its backbone between them."
        self._pauses = histogram("request_pause_seconds", pause_help, TOKEN_BUCKETS)
        self._refused = counter("request_refused", "Requests that were refused or failed.", "reason")

    @contextmanager
    def request(self, request_id: str, index: int) -> Iterator[RequestClock]:
        """Measure and log one choice of a request, from the start of the `with` block to the end of the block."""
        clock = RequestClock(self, request_id, index)
        self.running.inc()
        try:
            yield clock
        except (GeneratorExit, asyncio.CancelledError):  # the client disconnected
            clock.finish("abort")
            raise
        except Exception as error:
            clock.log("error", str(error))
            raise
        finally:
            self.running.dec()

    def count_cache(self, reason: str) -> None:
        self._cache.labels(self._model, reason).inc()

    def count_finished(self, finish_reason: str) -> None:
        self._success.labels(self._model, finish_reason).inc()

    def count_refused(self, reason: str) -> None:
        self._refused.labels(self._model, reason).inc()

    def count_resumed(self, pause: float | None) -> None:
        """Count that one request continues on another backbone.

        `pause` is the time in seconds between the last output before the failover and the first output after the
        failover. `pause` is None if there was no output before the failover.
        """
        self._resumed.inc()
        if pause is not None:
            self._pauses.observe(pause)


class RequestClock:
    """A `RequestClock` measures the times and counts the tokens of one choice, for metrics and the request log."""

    def __init__(self, metrics: RequestMetrics, request_id: str, index: int) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._request_id, self._index = request_id, index
        self._first: float | None = None
        self._last = self._start
        self._num_prompt = self._num_cached = self._num_generated = 0
        self._queued_s = 0.0
        self._cache_reason = ""

    def count(self, delta: TextDelta, queued_s: float) -> None:
        """Record the time and the tokens of one output of the engine.

        `queued_s` is the time in seconds that the request waited in the engine's queue.
        """
        now = time.perf_counter()
        if self._first is None:
            self._first = now
            self._count_first(delta, queued_s)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._metrics.generation_tokens.inc(len(delta.token_ids))
        self._num_generated += len(delta.token_ids)
        self._last = now

    def _count_first(self, delta: TextDelta, queued_s: float) -> None:
        metrics = self._metrics
        self._num_prompt, self._num_cached = delta.num_prompt, delta.num_cached
        self._queued_s, self._cache_reason = queued_s, delta.cache_reason
        metrics.first_token.observe(self._to_first_s)
        metrics.queue.observe(queued_s)
        metrics.prompt_tokens.inc(delta.num_prompt)
        metrics.cached_tokens.inc(delta.num_cached)
        metrics.prompt_lens.observe(delta.num_prompt)
        if delta.cache_reason:
            metrics.count_cache(delta.cache_reason)

    @property
    def _to_first_s(self) -> float:
        return (self._first or self._start) - self._start

    def finish(self, finish_reason: str) -> None:
        """Record and log the end of the choice; the `finish_reason` "abort" means that the client disconnected."""
        if finish_reason != "abort":
            self._metrics.whole.observe(time.perf_counter() - self._start)
            self._metrics.answer_lens.observe(self._num_generated)
        self._metrics.count_finished(finish_reason)
        self.log(finish_reason)

    def log(self, finish_reason: str, error: str = "") -> None:
        """Write the line of the choice to the request log."""
        fields = {
            "request_id": self._request_id,
            "choice": self._index,
            "finish_reason": finish_reason,
            "prompt_tokens": self._num_prompt,
            "cached_tokens": self._num_cached,
            "cache_reason": self._cache_reason,
            "completion_tokens": self._num_generated,
            "queued_s": round(self._queued_s, 4),
            "first_token_s": None if self._first is None else round(self._to_first_s, 4),
            "e2e_s": round(time.perf_counter() - self._start, 4),
        }
        log.info("%s", json.dumps(fields | ({"error": error} if error else {})))
