"""A `TierMetrics` makes metrics of the expert tier (shards, placement, load) from each backbone's status."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeHistogramMetricFamily, GaugeMetricFamily, Metric

from services.gateway.metrics.status_collector import LABELS, StatusCollector

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
    "num_hedges_denied": ("expert_hedges_denied", "Hedges that were not sent because their budget was used up."),
    "num_probes": ("expert_probes", "Messages to shards with an open circuit, to learn whether they work again."),
    "num_corrupt": ("expert_replies_corrupt", "Replies whose checksum was wrong."),
    "num_heals": ("expert_heals", "Times that rows waited because no home would compute them."),
}

PLACEMENT_GAUGES = {
    "epoch": ("placement_epoch", "Epoch of the placement in use."),
    "cover": ("placement_cover", "Live homes and standbys of the expert that has the fewest."),
    "placement_age_s": ("placement_age_seconds", "Time since the placement was last read from the store."),
    "down": ("shards_down", "Shards of the placement that do not serve what they should."),
}
TIER_GAUGES = {
    "experts_below_cover": ("experts_below_cover", "Experts with fewer than two live homes or standbys."),
    "blast_radius": ("blast_radius", "Largest share of picks that no shard could compute if one shard died now."),
    "circuits_open": ("shard_circuits_open", "Shards that are not called because they failed."),
    "repairing_s": ("time_to_repair_seconds", "For how long experts have been below cover; 0 if none is."),
    "time_to_repair_s": ("repair_remaining_seconds", "Estimate of the time to full cover; 0 if cover is full."),
    "last_repair_s": ("last_repair_seconds", "How long experts were below cover the last time."),
}
# Upper bounds of the histogram of shards by load, as multiples of the mean load of all shards. The histogram is a
# gauge, because the histogram counts the shards at the time of the request.
RELATIVE_LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
HOT_EXPERT = {
    "picks_per_s": "Picks per second of the most picked experts, by rank.",
    "layer": "The layer of the expert of that rank.",
    "expert": "The number of the expert of that rank within its layer.",
}


def _tier(status: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of the metrics in TIER_GAUGES, by key, from one backbone's status."""
    tier, now = status["tier"], time.time()
    since = tier["below_cover_since"]
    return {
        "experts_below_cover": tier["experts_below_cover"],
        "blast_radius": max(tier["blast_radius"].values(), default=0.0),
        "circuits_open": sum(shard["circuit"] in ("open", "half-open") for shard in status["shards"]),
        "repairing_s": 0.0 if since is None else max(0.0, now - since),
        "time_to_repair_s": tier["time_to_repair_s"] or 0.0,
        "last_repair_s": tier["last_repair_s"] or 0.0,
    }


def relative(loads: Sequence[float]) -> list[float]:
    """Return the shards' `loads` divided by the mean load, or 1.0 for every shard if all loads are 0."""
    mean = sum(loads) / len(loads) if loads else 0.0
    return [load / mean if mean else 1.0 for load in loads]


def _bound(value: float) -> str:
    return "+Inf" if value == float("inf") else str(value)


class TierMetrics(StatusCollector):
    """A `TierMetrics` collects metrics of traffic, placement, cover and balance; local experts have no such metrics."""

    def collect(self) -> Iterator[Metric]:
        remote = {endpoint: status for endpoint, status in self.statuses.items() if "traffic" in status}
        if remote:
            traffic = {endpoint: status["traffic"] for endpoint, status in remote.items()}
            placement = {endpoint: {**status, "down": len(status["down"])} for endpoint, status in remote.items()}
            yield from self.families(CounterMetricFamily, TRAFFIC_COUNTERS, traffic)
            yield from self.families(GaugeMetricFamily, PLACEMENT_GAUGES, placement)
            yield from self.families(
                GaugeMetricFamily, TIER_GAUGES, {endpoint: _tier(status) for endpoint, status in remote.items()}
            )
            yield from self._balance(remote)
            yield self.labelled(
                "expert_refusals",
                "Refusals by shards.",
                "code",
                {endpoint: counts["refusals"] for endpoint, counts in traffic.items()},
            )

    def _balance(self, statuses: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
        """Yield the metrics for balancedness, relative loads of shards and the hottest experts.

        The number of time series depends on the numbers of layers, buckets and ranks, but not on the numbers of experts
        and shards.
        """
        help_text = "Mean over maximum of the shards' picks in a layer; 1 is even."
        balance = GaugeMetricFamily("expertmesh:balancedness", help_text, labels=[*LABELS, "layer"])
        help_text = "Shards by their picks per second, as a multiple of the mean."
        shards = GaugeHistogramMetricFamily("expertmesh:shard_relative_load", help_text, labels=LABELS)
        hot = {
            key: GaugeMetricFamily(f"expertmesh:hot_expert_{key}", help_text, labels=[*LABELS, "rank"])
            for key, help_text in HOT_EXPERT.items()
        }
        for endpoint, status in statuses.items():
            tier, labels = status["tier"], [self.model, endpoint]
            for layer, value in tier["balancedness"].items():
                balance.add_metric([*labels, layer], value)
            loads = relative(list(tier["shard_picks_per_s"].values()))
            bounds = [*RELATIVE_LOADS, float("inf")]
            buckets = [(_bound(bound), float(sum(load <= bound for load in loads))) for bound in bounds]
            shards.add_metric(labels, buckets, gsum_value=sum(loads))
            for rank, expert in enumerate(tier["hottest"], 1):
                for key, family in hot.items():
                    family.add_metric([*labels, str(rank)], expert[key])
        yield from (balance, shards, *hot.values())
