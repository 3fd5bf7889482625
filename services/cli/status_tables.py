"""The functions in this file show the answers of `/status` and of the admin API as tables of at most 80 columns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from rich.table import Table

Report = dict[str, Any]
NUM_DECISIONS = 5


def status_tables(report: Report) -> Iterator[Table]:
    yield _model(report)
    if not report.get("shards"):
        return
    yield _tier(report)
    if report.get("pools"):
        yield _pools(report)
    yield _shards(report["shards"])
    if any("pace" in shard for shard in report["shards"]):
        yield _paces(report["shards"])
    if report.get("orders"):
        yield _orders(report["orders"])
    if report.get("decisions"):
        yield decisions_table(report["decisions"][:NUM_DECISIONS])


def _table(title: str, *columns: str, numbers: tuple[str, ...] = (), wraps: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in columns:
        justify: Any = "right" if name in numbers else "left"
        table.add_column(name, justify=justify, no_wrap=name not in wraps, overflow="fold")
    return table


def _model(report: Report) -> Table:
    model = Table(title=f"{report['model']}: {report['health']}", box=None, padding=(0, 1, 0, 0))
    for name in ("running", "waiting", "steps", "state slots", "KV pages", "placement", "age"):
        model.add_column(name, justify="right")
    placement = f"epoch {report['epoch']}, cover {report['cover']}" if report.get("epoch") else "local experts"
    age = f"{report['placement_age_s']:.1f} s" if report.get("epoch") else "–"
    for backbone in report.get("backbones", [report]):
        engine = backbone["engine"]
        slots = f"{engine['num_slots_taken']}/{engine['num_slots']}"
        pages = f"{engine['num_blocks_taken']}/{engine['num_blocks']}"
        running, waiting, steps = (str(engine[key]) for key in ("num_running", "num_waiting", "num_steps"))
        model.add_row(running, waiting, steps, slots, pages, placement, age)
    return model


def _tier(report: Report) -> Table:
    table = _table("Expert tier", "below cover", "blast radius", "repair", "balance", "leader", wraps=("leader",))
    tier = report.get("tier")
    if tier is None:
        return table
    left, last = tier["time_to_repair_s"], tier["last_repair_s"]
    repair = f"~{left:.0f} s left" if left is not None else f"last {last:.1f} s" if last is not None else "–"
    balance = tier["balancedness"].values()
    mean = sum(balance) / len(balance) if balance else 1.0
    radius = max(tier["blast_radius"].values(), default=0.0)
    leader = report.get("leader") or report.get("store") or "none"
    table.add_row(f"{tier['experts_below_cover']} experts", f"{radius:.2%}", repair, f"{mean:.2f}", leader)
    return table


def _pools(report: Report) -> Table:
    table = _table("Pools", "pool", "shards", "draining", "ordered", "queue", numbers=("shards", "draining", "queue"))
    for pool in report["pools"]:
        ordered = "by load" if pool["num_ordered"] is None else str(pool["num_ordered"])
        table.add_row(
            pool["name"], str(pool["num_shards"]), str(pool["num_draining"]), ordered, str(pool["queue_depth"])
        )
    return table


def _shards(shards: list[Report]) -> Table:
    numbers = ("experts", "picks/s", "share")
    # The table needs no column for the pool, because a shard's id starts with the name of its pool.
    names = ("shard", "endpoint", "device", *numbers, "state")
    table = _table("Expert shards", *names, numbers=numbers, wraps=("shard",))
    total = sum(shard["picks_per_s"] for shard in shards) or 1
    for shard in shards:
        words = [shard[key] for key in ("id", "endpoint", "device")]
        load = [str(shard["num_held"]), f"{shard['picks_per_s']:.0f}", f"{shard['picks_per_s'] / total:.0%}"]
        table.add_row(*words, *load, shard["state"])
    return table


def _paces(shards: list[Report]) -> Table:
    numbers = ("queue", "µs/call", "µs/MiB", "µs/row·MiB", "blast radius")
    names = ("of shard", *numbers, "circuit", "node")
    table = _table("Pace and risk", *names, numbers=numbers, wraps=("of shard", "node"))
    for shard in shards:
        pace = [f"{shard['pace'][key]:.0f}" for key in ("call_us", "weight_us_per_mib", "row_us_per_mib")]
        risk = f"{shard['blast_radius']:.2%}"
        short = shard["id"].rpartition("-")[2]
        table.add_row(short, str(shard["queue_depth"]), *pace, risk, shard["circuit"], shard["node"])
    return table


def _orders(orders: list[Report]) -> Table:
    table = _table("Standing orders", "order", "of", "shards", "by", "given", numbers=("shards",), wraps=("of", "by"))
    for order in orders:
        count = str(order["count"]) if order["count"] else ""
        table.add_row(order["kind"], order["subject"] or "all", count, order["by"], _ago(order["at"]))
    return table


def decisions_table(decisions: list[Report]) -> Table:
    table = _table("Last decisions", "when", "kind", "what and why", wraps=("what and why",))
    for decision in decisions:
        others = {key: value for key, value in decision.items() if key not in ("at", "kind", "by", "why")}
        numbers = ", ".join(_number(key, value) for key, value in others.items())
        table.add_row(
            _ago(float(decision.get("at", 0))), decision.get("kind", ""), f"{numbers}. {decision.get('why', '')}"
        )
    return table


def _number(name: str, value: str) -> str:
    return f"{int(value) / 2**20:,.1f} MiB" if name == "bytes" else f"{name} {value}"


def load_table(report: Report) -> Table:
    numbers = ("layer", "expert", "picks/s", "of layer")
    table = _table(f"Most picked in {report['seconds']:.0f} s", *numbers, "homes", numbers=numbers, wraps=("homes",))
    for one in report["experts"]:
        homes = [*one["homes"], *(f"({id})" for id in one["standby"])]
        rate, share = f"{one['picks_per_s']:.1f}", f"{one['share']:.1%}"
        table.add_row(str(one["layer"]), str(one["expert"]), rate, share, " ".join(homes))
    return table


def _ago(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
