"""The backbone's own numbers in Prometheus' format, asked from it when somebody asks us.

Names are vLLM's, with our prefix, where it has the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

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
    "num_preemptions": ("num_preemptions", "Requests put back and computed again."),
    "num_evictions": ("prefix_cache_evictions", "Checkpoints that were given up for memory."),
    "num_prompt_tokens": ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache."),
    "num_cached_tokens": ("prefix_cache_hits", "Tokens of prompts that were found there."),
    "num_refused": ("engine_requests_refused", "Requests refused because too many were waiting."),
    "num_steps": ("engine_steps", "Steps of the engine."),
    "num_failed_steps": ("engine_failed_steps", "Steps that failed."),
}
TRAFFIC_COUNTERS = {
    "num_calls": ("expert_calls", "MoE layer calls to the expert tier."),
    "num_rows": ("expert_rows", "Token rows in those calls."),
    "num_sent": ("expert_messages_sent", "Messages to shards."),
    "sent_bytes": ("expert_sent_bytes", "Bytes sent to shards."),
    "received_bytes": ("expert_received_bytes", "Bytes received from shards."),
    "num_lost": ("expert_calls_lost", "Messages whose shard or stream was lost."),
    "num_stalled": ("expert_calls_stalled", "Messages resent because a shard was silent."),
}


PLACEMENT_GAUGES = {
    "epoch": ("placement_epoch", "Epoch of the placement in use."),
    "cover": ("placement_cover", "Live homes of the expert that has fewest."),
    "placement_age_s": ("placement_age_seconds", "Time since the placement was last read from the store."),
    "down": ("shards_down", "Shards of the placement that do not serve what they should."),
}


class _Status(Collector):
    def __init__(self, model: str, status: Mapping[str, Any]) -> None:
        self.model, self.status = model, status

    def collect(self) -> Iterator[Metric]:
        yield from self._family(GaugeMetricFamily, ENGINE_GAUGES, self.status["engine"])
        yield from self._family(CounterMetricFamily, ENGINE_COUNTERS, self.status["engine"])
        yield from self._usage(self.status["engine"])
        yield from self._drafts(self.status["engine"])
        yield from self._labelled(
            "engine_prefix_cache_requests",
            "Requests by what the prefix cache did for them.",
            "reason",
            self.status["engine"]["cache_reasons"],
        )
        if "traffic" in self.status:
            yield from self._family(CounterMetricFamily, TRAFFIC_COUNTERS, self.status["traffic"])
            yield from self._family(
                GaugeMetricFamily, PLACEMENT_GAUGES, {**self.status, "down": len(self.status["down"])}
            )

    def _usage(self, engine: Mapping[str, Any]) -> Iterator[Metric]:
        for name, key in (("kv_cache_usage_perc", "num_blocks"), ("state_slot_usage_perc", "num_slots")):
            help_text = "Share that running requests hold; 1 is all."
            family = GaugeMetricFamily(f"expertmesh:{name}", help_text, labels=["model_name"])
            family.add_metric([self.model], engine[f"{key}_taken"] / engine[key])
            yield family

    def _drafts(self, engine: Mapping[str, Any]) -> Iterator[Metric]:
        for verb, help_text in (("draft", "Tokens drafted"), ("accepted", "Drafted tokens that were accepted")):
            by_position = engine["drafted_by_position" if verb == "draft" else "accepted_by_position"]
            name = f"expertmesh:spec_decode_num_{verb}_tokens"
            total = CounterMetricFamily(name, f"{help_text}.", labels=["model_name"])
            total.add_metric([self.model], sum(by_position))
            yield total
            positions = {str(position): count for position, count in enumerate(by_position)}
            yield from self._labelled(
                f"spec_decode_num_{verb}_tokens_per_pos",
                f"{help_text}, by their place in the draft.",
                "position",
                positions,
            )

    def _labelled(self, name: str, help_text: str, label: str, counts: Mapping[str, int]) -> Iterator[Metric]:
        family = CounterMetricFamily(f"expertmesh:{name}", help_text, labels=["model_name", label])
        for value, count in counts.items():
            family.add_metric([self.model, value], count)
        yield family

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        names: Mapping[str, tuple[str, str]],
        values: Mapping[str, Any],
    ) -> Iterator[Metric]:
        for key, (name, help_text) in names.items():
            family = kind(f"expertmesh:{name}", help_text, labels=["model_name"])
            family.add_metric([self.model], values[key])
            yield family


def backbone_metrics(model: str, status: Mapping[str, Any]) -> bytes:
    """`status` as `Backbone.status` returns it."""
    registry = CollectorRegistry()
    registry.register(_Status(model, status))
    return generate_latest(registry)
