"""`replay` plans a placement for the load that a routing trace recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.placement.plan import PlanPolicy
from cluster.placement.planner import plan
from cluster.topology import Homes, LayerSpec, Placement, Shard
from cluster.trace import read_trace


def replay(path: Path, fleet: dict[str, Any]) -> dict[str, Any]:
    """Plan a placement for the load of a recorded trace, and return the plan as JSON values.

    The plan contains the balancedness before and after the plan. `path` is the file of the trace, and `fleet` is the
    server's answer to GET /admin/placement. The server's placement does not change. Raises ValueError if the server has
    no placement yet, or if the trace was recorded with another model.
    """
    trace = read_trace(path)
    layers = [LayerSpec(**spec) for spec in fleet["layers"]]
    shards = [Shard.from_json(shard) for shard in fleet["shards"]]
    if fleet["placement"] is None:
        raise ValueError("there is no placement yet to start from; try again when `expertmesh status` shows an epoch")
    stored = fleet["placement"]
    placement = Placement(stored["epoch"], _homes(stored["homes"]), {}, stored["model"], _homes(stored["standby"]))
    if trace.model != placement.model or dict(trace.num_experts) != {spec.layer: spec.num_experts for spec in layers}:
        raise ValueError(f"the trace {path} was recorded with the checkpoint {trace.model}, not with {placement.model}")
    planned = plan(layers, shards, placement, trace.loads(), PlanPolicy(rows_per_step=max(1.0, trace.rows_per_call)))
    before, after = trace.balancedness(placement.homes), trace.balancedness(planned.homes)
    means = [sum(values.values()) / len(values) for values in (before, after)]
    report = planned.to_dict()
    report["text"] = (
        f"{trace.num_calls} calls of {trace.rows_per_call:.1f} rows on average, in {path}.\n"
        f"Balancedness (mean over maximum of the shards' picks, mean of the layers): {means[0]:.3f} now, "
        f"{means[1]:.3f} with the plan.\n{report['text']}"
    )
    balance = {"before": means[0], "after": means[1], "by_layer": {"before": before, "after": after}}
    return {**report, "balancedness": balance}


def _homes(of_layers: dict[str, list[list[str]]]) -> dict[int, Homes]:
    return {int(layer): tuple(tuple(ids) for ids in homes) for layer, homes in of_layers.items()}
