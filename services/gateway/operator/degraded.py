"""The degraded report says how many experts have a cover below two, and when the repair will end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.placement.coverage import FULL_COVER

REPORTED_KEYS = (  # keys that the report copies from the expert tier's status
    *("experts_below_cover", "below_cover_by_homes", "missing_bytes", "below_cover_since"),
    *("time_to_repair_s", "last_repair_s", "num_repairs", "blast_radius"),
)


def degraded_report(statuses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report for `/health/degraded` from the result of `BackbonePool.statuses`.

    Backbones may see the fleet differently. The report uses the status of the backbone that sees the most experts with
    a cover below two.

    - `status` is "covered", "degraded", or "local" (the experts are in the backbone).
    - Times are in seconds.
    - The blast radius of a shard is the share of picks that no shard could compute if the shard died now.
    """
    remote = [status for status in statuses if "tier" in status]
    if not remote:
        return {"status": "local", "detail": "The experts are in the backbone; no shard can be lost."}
    worst = max(remote, key=lambda status: (status["tier"]["experts_below_cover"], status["placement_age_s"]))
    tier = worst["tier"]
    below = [{"layer": layer, "expert": expert, "homes": homes} for layer, expert, homes in tier["below_cover"]]
    return {
        "status": "degraded" if tier["experts_below_cover"] else "covered",
        "detail": _sentence(tier),
        **{name: tier[name] for name in REPORTED_KEYS},
        "max_blast_radius": max(tier["blast_radius"].values(), default=0.0),
        "below_cover": below,
        "placement_age_s": max(status["placement_age_s"] for status in remote),
        "epochs": sorted({status["epoch"] for status in remote}),
        "down": sorted({id for status in remote for id in status["down"]}),
    }


def _sentence(tier: Mapping[str, Any]) -> str:
    num_below = tier["experts_below_cover"]
    if not num_below:
        return f"Every expert has {FULL_COVER} live homes."
    num_dead = tier["below_cover_by_homes"]["0"]
    lost = f" ({num_dead} without any live home)" if num_dead else ""
    left = tier["time_to_repair_s"]
    return f"{num_below} experts have fewer than {FULL_COVER} live homes{lost}; repair is expected in {left:.0f} s."
