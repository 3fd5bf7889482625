"""The tests check the report of `/health/degraded` and the metrics of the expert tier, from a backbone's status."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.control.registry_store import HEARTBEAT_TTL_S
from cluster.dispatch.call_policy import Traffic
from cluster.topology import Placement
from services.engine.fleet_connection import CoverageMonitor
from services.gateway.metrics.status_collector import LABELS
from services.gateway.metrics.tier_metrics import RELATIVE_LOADS, TierMetrics, relative
from services.gateway.operator.degraded import degraded_report

PLACEMENT = Placement(7, {0: (("a", "b"), ("a", "c"), ("b", "c")), 4: (("a", "b"),) * 30}, {})
RATES = {0: np.array([6.0, 3.0, 3.0]), 4: np.arange(30) / 30}
MB = 1_000_000


class WatchedBackbone:
    """A `WatchedBackbone` makes the parts of a backbone's status that the report and the metrics use."""

    def __init__(self) -> None:
        self.monitor = CoverageMonitor({0: 500 * MB, 4: MB})

    def status(self, now: float, *live: str, open_circuit: str = "") -> dict[str, Any]:
        coverage = self.monitor.update(PLACEMENT, live, now)
        tier = self.monitor.report(coverage, RATES, now)
        down = sorted({"a", "b", "c"} - set(live))
        circuits = [{"circuit": "open" if id == open_circuit else "closed"} for id in "abc"]
        fleet = {"tier": tier, "down": down, "shards": circuits, "epoch": 7, "cover": 2, "placement_age_s": 0.5}
        return {"endpoint": "x:1", "traffic": asdict(Traffic(num_corrupt=3, num_hedged=5)), **fleet}


def test_full_cover_is_said_so() -> None:
    report = degraded_report([WatchedBackbone().status(1.0, "a", "b", "c")])
    assert (report["status"], report["detail"]) == ("covered", "Every expert has 2 live homes.")
    assert (report["experts_below_cover"], report["max_blast_radius"]) == (0, 0.0)
    assert (report["time_to_repair_s"], report["below_cover"], report["down"]) == (None, [], [])


def test_a_dead_shard_degrades_until_its_experts_have_new_homes() -> None:
    backbone = WatchedBackbone()
    backbone.status(1.0, "a", "b", "c")
    report = degraded_report([backbone.status(10.0, "a", "b")])
    assert (report["status"], report["experts_below_cover"], report["down"]) == ("degraded", 2, ["c"])
    assert [(one["layer"], one["expert"], one["homes"]) for one in report["below_cover"]] == [(0, 1, 1), (0, 2, 1)]
    total = sum(float(rate.sum()) for rate in RATES.values())
    assert report["blast_radius"] == pytest.approx({"a": 3 / total, "b": 3 / total, "c": 0.0})
    assert report["missing_bytes"] == 2 * 500 * MB
    assert report["time_to_repair_s"] == HEARTBEAT_TTL_S + 1.0  # 1 GB is loaded at 1 GB/s
    assert report["detail"].endswith("2 live homes; repair is expected in 4 s.")
    again = degraded_report([backbone.status(12.0, "a")])
    assert again["below_cover_since"] == 10.0
    assert again["below_cover_by_homes"] == {"0": 1, "1": 32}
    assert "33 experts have fewer than 2 live homes (1 without any live home); " in again["detail"]
    repaired = degraded_report([backbone.status(15.5, "a", "b", "c")])
    assert (repaired["status"], repaired["last_repair_s"], repaired["num_repairs"]) == ("covered", 5.5, 1)
    assert (
        degraded_report([backbone.status(20.0, "a", "b")])["time_to_repair_s"] == 5.5
    )  # the estimate is the duration of the last repair


def test_of_several_views_the_worst_is_told() -> None:
    views = [WatchedBackbone().status(1.0, *live) for live in (("a", "b", "c"), ("a", "c"))]
    assert degraded_report(views)["status"] == "degraded"


def test_local_experts_cannot_be_lost() -> None:
    assert degraded_report([{"endpoint": "x:1", "engine": {}}])["status"] == "local"


def metric_values(status: dict[str, Any]) -> dict[str, float]:
    """Return a mapping with the values of all metrics that the `status` of one backbone gives.

    A key is a metric's name without "expertmesh:", followed by the values of the labels that only some metrics have.
    """
    registry = CollectorRegistry()
    registry.register(TierMetrics("demo", [status]))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            own = [value for label, value in sample.labels.items() if label not in LABELS]
            found[" ".join([sample.name.removeprefix("expertmesh:"), *own])] = sample.value
    return found


def test_metrics_tell_cover_balance_and_load_in_bounded_series() -> None:
    values = metric_values(WatchedBackbone().status(1.0, "a", "b", open_circuit="c"))
    assert values["experts_below_cover"] == 2
    assert values["shard_circuits_open"] == 1
    assert values["repair_remaining_seconds"] == 4.0
    assert values["expert_replies_corrupt_total"] == 3
    assert values["expert_calls_hedged_total"] == 5
    assert values["hot_expert_picks_per_s 1"] == 6.0
    assert values["hot_expert_layer 20"] == 4
    assert "hot_expert_layer 21" not in values
    loads_0 = [4.5, 4.5, 3.0]
    assert values["balancedness 0"] == pytest.approx(sum(loads_0) / 3 / 4.5)
    buckets = [values[f"shard_relative_load_bucket {bound}"] for bound in (*RELATIVE_LOADS, "+Inf")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == values["shard_relative_load_gcount"] == 3


def test_loads_are_told_relative_to_their_mean() -> None:
    assert relative([1.0, 3.0]) == [0.5, 1.5]
    assert relative([0.0, 0.0]) == [1.0, 1.0]
    assert relative([]) == []
