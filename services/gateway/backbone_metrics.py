"""The backbone's own numbers in Prometheus' format, asked from it when somebody asks us.

Names are vLLM's, with our prefix, where it has the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LABELS = ["model_name", "backbone"]
Values = Mapping[str, Mapping[str, Any]]  # of each backbone, by endpoint
Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]
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
    "num_hedged": ("expert_calls_hedged", "Messages sent to a second home because the first was late."),
    "num_hedges_won": ("expert_hedges_won", "Times that the second home answered first."),
    "num_corrupt": ("expert_replies_corrupt", "Replies whose checksum was wrong."),
    "num_heals": ("expert_heals", "Times that rows waited because no home would compute them."),
}


PLACEMENT_GAUGES = {
    "epoch": ("placement_epoch", "Epoch of the placement in use."),
    "cover": ("placement_cover", "Live homes of the expert that has fewest."),
    "placement_age_s": ("placement_age_seconds", "Time since the placement was last read from the store."),
    "down": ("shards_down", "Shards of the placement that do not serve what they should."),
}


class _Statuses(Collector):
    """Every number is told of each backbone by itself: a sum would fall where one of them restarts."""

    def __init__(self, model: str, statuses: Sequence[Mapping[str, Any]]) -> None:
        self.model = model
        self.statuses = {str(status["endpoint"]): status for status in statuses}

    def collect(self) -> Iterator[Metric]:
        engines = {endpoint: status["engine"] for endpoint, status in self.statuses.items()}
        yield from self._families(GaugeMetricFamily, ENGINE_GAUGES, engines)
        yield from self._families(CounterMetricFamily, ENGINE_COUNTERS, engines)
        yield from self._usage(engines)
        yield from self._drafts(engines)
        yield self._labelled(
            "engine_prefix_cache_requests",
            "Requests by what the prefix cache did for them.",
            "reason",
            {endpoint: engine["cache_reasons"] for endpoint, engine in engines.items()},
        )
        remote = {endpoint: status for endpoint, status in self.statuses.items() if "traffic" in status}
        if remote:
            traffic = {endpoint: status["traffic"] for endpoint, status in remote.items()}
            placement = {endpoint: {**status, "down": len(status["down"])} for endpoint, status in remote.items()}
            yield from self._families(CounterMetricFamily, TRAFFIC_COUNTERS, traffic)
            yield from self._families(GaugeMetricFamily, PLACEMENT_GAUGES, placement)

    def _usage(self, engines: Values) -> Iterator[Metric]:
        for name, key in (("kv_cache_usage_perc", "num_blocks"), ("state_slot_usage_perc", "num_slots")):
            shares = {endpoint: engine[f"{key}_taken"] / engine[key] for endpoint, engine in engines.items()}
            yield self._family(GaugeMetricFamily, name, "Share that running requests hold; 1 is all.", shares)

    def _drafts(self, engines: Values) -> Iterator[Metric]:
        for verb, help_text in (("draft", "Tokens drafted"), ("accepted", "Drafted tokens that were accepted")):
            key = "drafted_by_position" if verb == "draft" else "accepted_by_position"
            name = f"spec_decode_num_{verb}_tokens"
            totals = {endpoint: sum(engine[key]) for endpoint, engine in engines.items()}
            yield self._family(CounterMetricFamily, name, f"{help_text}.", totals)
            yield self._labelled(
                f"{name}_per_pos",
                f"{help_text}, by their place in the draft.",
                "position",
                {
                    endpoint: {str(n): count for n, count in enumerate(engine[key])}
                    for endpoint, engine in engines.items()
                },
            )

    def _labelled(self, name: str, help_text: str, label: str, counts: Mapping[str, Mapping[str, int]]) -> Metric:
        family = CounterMetricFamily(f"expertmesh:{name}", help_text, labels=[*LABELS, label])
        for endpoint, count_of in counts.items():
            for value, count in count_of.items():
                family.add_metric([self.model, endpoint, value], count)
        return family

    def _families(self, kind: Kind, names: Mapping[str, tuple[str, str]], values: Values) -> Iterator[Metric]:
        for key, (name, help_text) in names.items():
            told = {endpoint: of_one[key] for endpoint, of_one in values.items()}
            yield self._family(kind, name, help_text, told)

    def _family(self, kind: Kind, name: str, help_text: str, values: Mapping[str, float]) -> Metric:
        family = kind(f"expertmesh:{name}", help_text, labels=LABELS)
        for endpoint, value in values.items():
            family.add_metric([self.model, endpoint], value)
        return family


def backbone_metrics(model: str, statuses: Sequence[Mapping[str, Any]]) -> bytes:
    """`statuses` as `Backbones.statuses` returns them; the label `backbone` holds the endpoint."""
    registry = CollectorRegistry()
    registry.register(_Statuses(model, statuses))
    return generate_latest(registry)
