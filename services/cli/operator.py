"""The commands in this file are for operators.

Each command sends requests to a running server. Most commands use the server's admin API.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import typer

from services.cli.status_tables import decisions_table, load_table, status_tables
from services.cli.terminal import DEFAULT_URL, AsJson, Url, console, fetch, plain_errors

Key = Annotated[
    str,
    typer.Option(
        "--admin-key", envvar="EXPERTMESH_ADMIN_KEY", help="Key of the server's admin API.", show_default=False
    ),
]


def _show(report: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report)


def _by() -> str:
    """Return the name that the server records as the giver of an order: user@host, at most 128 characters."""
    return f"{getpass.getuser()}@{socket.gethostname()}"[:128]


def status(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show pools, shards, experts, load, cover, orders and the last decisions."""

    def show(report: Any) -> None:
        for table in status_tables(report):
            console.print(table)

    with plain_errors():
        _show(fetch(url, "/status"), as_json, show)


def plan(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Plan for the load that this trace file recorded, and change nothing.")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Print the plan for a better placement, and order the controller to carry out the plan."""
    with plain_errors():
        if trace is not None:
            from services.cli.replay import replay

            report = replay(trace, fetch(url, "/admin/placement", admin_key))
        else:
            report = fetch(url, "/admin/plan", admin_key)
            if not dry_run:
                report |= fetch(url, "/admin/rebalance", admin_key, {"by": _by()})

    def show(answer: Any) -> None:
        typer.echo(answer["text"])
        if "order" in answer:
            typer.echo(
                "The controller was ordered to rebalance; it plans again at its next turn, for the load at that time."
            )

    _show(report, as_json, show)


def rebalance(url: Url = DEFAULT_URL, admin_key: Key = "", as_json: AsJson = False) -> None:
    """Order the controller to plan now and to move experts for any gain, however small."""
    with plain_errors():
        report = fetch(url, "/admin/rebalance", admin_key, {"by": _by()})
    _show(report, as_json, lambda _: typer.echo("The controller plans at its next turn."))


def scale(
    pool: Annotated[str, typer.Argument(help="Name of the pool; `expertmesh status` lists the pools.")],
    shards: Annotated[
        int | None, typer.Argument(min=1, help="Number of shards that the pool must have.", show_default=False)
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Lift the order, so that the load decides the number of shards.")
    ] = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Order a pool to grow or shrink to a number of shards."""
    with plain_errors():
        if auto == (shards is not None):
            raise ValueError("scale needs either a number of shards or --auto, which leaves the number to the load")
        report = fetch(url, f"/admin/pools/{quote(pool, safe='')}/scale", admin_key, {"shards": shards, "by": _by()})
    sentence = f"{pool} is scaled by its load." if auto else f"{pool} was ordered to have {shards} shards."
    _show(report, as_json, lambda _: typer.echo(sentence))


def drain(
    shard: Annotated[str, typer.Argument(help="Id of the shard; `expertmesh status` lists the shards.")],
    undo: Annotated[
        bool, typer.Option("--undo", help="Lift the order, so that the shard may hold experts again.")
    ] = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Order the controller to move a shard's experts to other shards.

    The shard keeps running without experts until the order is lifted with --undo.
    """
    with plain_errors():
        report = fetch(url, f"/admin/shards/{quote(shard, safe='')}/drain", admin_key, {"undo": undo, "by": _by()})
    had_order = report.get("lifted", True)
    done = "may hold experts again" if had_order else "was not ordered to drain"
    sentence = f"{shard} {done}." if undo else f"{shard} is being emptied; `expertmesh status` shows the progress."
    _show(report, as_json, lambda _: typer.echo(sentence))


def load(
    top: Annotated[int, typer.Option(min=1, max=1000, help="Number of experts to show.")] = 20,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the load of every expert by layer, as JSON.")
    ] = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show the experts with the most picks."""
    with plain_errors():
        report = fetch(url, "/admin/load" if everything else f"/admin/load?top={top}", admin_key)
    _show(report, as_json or everything, lambda answer: console.print(load_table(answer)))


def decisions(
    count: Annotated[int, typer.Option(min=1, max=1000, help="Number of decisions to show, the newest first.")] = 20,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show the latest decisions of the controller, and their reasons."""
    with plain_errors():
        report = fetch(url, f"/admin/decisions?count={count}", admin_key)
    _show(report, as_json, lambda answer: console.print(decisions_table(answer["decisions"])))


def trace(
    action: Annotated[str, typer.Argument(help="Either start or stop.")],
    max_seconds: Annotated[float, typer.Option(help="Maximum number of seconds to record.")] = 60.0,
    max_mib: Annotated[
        int, typer.Option(min=1, max=1024, help="Maximum size of the file in MiB; recording stops at this size.")
    ] = 64,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Record which experts the router picks, for `plan --trace`.

    Each backbone writes a file on its own machine, and the answer names the file.
    """
    with plain_errors():
        if action not in ("start", "stop"):
            raise ValueError(f"trace {action!r} is neither start nor stop")
        bounds = {"max_bytes": max_mib << 20, "max_seconds": max_seconds} if action == "start" else {}
        report = fetch(url, "/admin/traces", admin_key, {"action": action, **bounds})

    def show(answer: Any) -> None:
        for backbone in answer["backbones"]:
            typer.echo(f"{backbone.get('endpoint', '?')}: {_recording(backbone)}")

    _show(report, as_json, show)


def _recording(backbone: dict[str, Any]) -> str:
    """Return, in words, the reply of a backbone that was ordered to start or stop recording."""
    if not backbone.get("path"):
        return str(backbone.get("error", "nothing was recorded"))
    path = backbone["path"]
    if backbone["is_recording"]:
        return f"records into {path}"
    return f"{path}: {backbone['num_calls']} calls, {backbone['num_dropped']} left out; {backbone['why_ended']}"


def drill(
    kill: Annotated[str, typer.Option("--kill", help="What to kill; the only allowed value is shard.")],
    load: Annotated[
        bool,
        typer.Option("--under-load", help="Kill while requests are answered, and compare with an undisturbed run."),
    ] = False,
    shard: Annotated[str, typer.Option(help="Id of the shard to kill. Default: the shard with the most picks.")] = "",
    rate: Annotated[float, typer.Option(min=0.01, max=1000, help="Requests per second under load.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=5, max=3600, help="Seconds of load in each of the two runs.")] = 40.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of each answer.")] = 32,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Kill a shard of this machine with SIGKILL, and tell how requests were affected.

    The exit code is 1 if requests were affected, or if the experts did not all get two homes again. Run the drill at no
    more than 60 % of the rate that the server can sustain: at higher rates requests wait for each other even if no
    shard dies.
    """
    from services.cli.drill.shard_drill import DrillResult, drill_shard

    with plain_errors():
        if kill != "shard":
            raise ValueError(f"--kill is {kill!r}; the only thing that a drill kills is a shard")
        if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"--url is {url}, but a drill kills processes of this machine: use http://127.0.0.1:PORT")
        result: DrillResult = asyncio.run(drill_shard(url, shard, (rate, seconds, max_tokens) if load else None))
    _show(result.to_dict(), as_json, lambda _: typer.echo(result.describe()))
    if not result.is_unnoticed:
        raise typer.Exit(1)
