"""The backbone's own numbers in Prometheus' format, asked from it when somebody asks us."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

ENGINE_GAUGES = {
    "num_running": ("engine_requests_running", "Requests that the engine computes."),
    "num_waiting": ("num_requests_waiting", "Requests that wait for memory."),
    "num_slots_taken": ("state_slots_taken", "Recurrent-state slots in use."),
    "num_slots": ("state_slots", "Recurrent-state slots in all."),
    "num_blocks_taken": ("kv_blocks_taken", "KV pages in use."),
    "num_blocks": ("kv_blocks", "KV pages in all."),
}
ENGINE_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Requests put back and computed again."),
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
        if "traffic" in self.status:
            yield from self._family(CounterMetricFamily, TRAFFIC_COUNTERS, self.status["traffic"])
            yield from self._family(
                GaugeMetricFamily, PLACEMENT_GAUGES, {**self.status, "down": len(self.status["down"])}
            )

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
