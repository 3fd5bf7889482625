"""`backbone_metrics` returns a registry with the metrics of the engines, from the statuses of the backbones.

The gateway asks the backbones for their statuses whenever a client requests `/metrics`. A metric that also exists in
vLLM has vLLM's name, with the prefix `expertmesh:`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.gateway.metrics.status_collector import StatusCollector, Values
from services.gateway.metrics.tier_metrics import TierMetrics

ENGINE_GAUGES = {
    "num_running": ("num_requests_running", "Requests that the engine computes."),
    "num_waiting": ("num_requests_waiting", "Requests that wait for memory."),
    "num_slots_taken": ("state_slots_taken", "Recurrent-state slots in use."),
    "num_slots": ("state_slots", "Recurrent-state slots in all."),
    "num_blocks_taken": ("kv_blocks_taken", "KV pages in use."),
    "num_blocks": ("kv_blocks", "KV pages in all."),
    "num_slots_cached": ("state_slots_cached", "Recurrent-state slots that hold checkpoints of the prefix cache."),
    "num_blocks_cached": ("kv_blocks_cached", "KV pages that only the prefix cache keeps."),
    "num_checkpoints": ("prefix_cache_checkpoints", "Checkpoints of the prefix cache."),
}
ENGINE_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Requests that were preempted and computed again."),
    "num_evictions": ("prefix_cache_evictions", "Checkpoints that were evicted to free memory."),
    "num_prompt_tokens": ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache."),
    "num_cached_tokens": ("prefix_cache_hits", "Tokens of prompts that were found in the prefix cache."),
    "num_refused": ("engine_requests_refused", "Requests refused because too many were waiting."),
    "num_steps": ("engine_steps", "Steps of the engine."),
    "num_failed_steps": ("engine_failed_steps", "Steps that failed."),
}


class EngineMetrics(StatusCollector):
    """An `EngineMetrics` collects the metrics of each backbone's engine."""

    def collect(self) -> Iterator[Metric]:
        engines = {endpoint: status["engine"] for endpoint, status in self.statuses.items()}
        yield from self.families(GaugeMetricFamily, ENGINE_GAUGES, engines)
        yield from self.families(CounterMetricFamily, ENGINE_COUNTERS, engines)
        yield from self._usage(engines)
        yield from self._drafts(engines)
        yield self.labelled(
            "engine_prefix_cache_requests",
            "Requests by what the prefix cache did for them.",
            "reason",
            {endpoint: engine["cache_reasons"] for endpoint, engine in engines.items()},
        )

    def _usage(self, engines: Values) -> Iterator[Metric]:
        for name, key in (("kv_cache_usage_perc", "num_blocks"), ("state_slot_usage_perc", "num_slots")):
            shares = {endpoint: engine[f"{key}_taken"] / engine[key] for endpoint, engine in engines.items()}
            yield self.family(GaugeMetricFamily, name, "Share that running requests hold, from 0 to 1.", shares)

    def _drafts(self, engines: Values) -> Iterator[Metric]:
        for verb, help_text in (("draft", "Tokens drafted"), ("accepted", "Drafted tokens that were accepted")):
            key = "drafted_by_position" if verb == "draft" else "accepted_by_position"
            name = f"spec_decode_num_{verb}_tokens"
            totals = {endpoint: sum(engine[key]) for endpoint, engine in engines.items()}
            yield self.family(CounterMetricFamily, name, f"{help_text}.", totals)
            yield self.labelled(
                f"{name}_per_pos",
                f"{help_text}, by their place in the draft.",
                "position",
                {
                    endpoint: {str(n): count for n, count in enumerate(engine[key])}
                    for endpoint, engine in engines.items()
                },
            )


def backbone_metrics(model: str, statuses: Sequence[Mapping[str, Any]]) -> CollectorRegistry:
    """Return a registry with the metrics of all backbones.

    `statuses` is the result of `BackbonePool.statuses`. The label `backbone` holds a backbone's endpoint.
    """
    registry = CollectorRegistry()
    registry.register(EngineMetrics(model, statuses))
    registry.register(TierMetrics(model, statuses))
    return registry
