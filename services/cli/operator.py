"""Commands for operators; each asks a running server, most of them over its admin API."""

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
    str, typer.Option("--admin-key", envvar="EXPERTMESH_ADMIN_KEY", help="The server's.", show_default=False)
]


def _show(report: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report)


def _by() -> str:
    """Who gives an order."""
    return f"{getpass.getuser()}@{socket.gethostname()}"[:128]


def status(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show pools, shards, experts, load, cover, orders and the last decisions."""

    def show(report: Any) -> None:
        for table in status_tables(report):
            console.print(table)

    with plain_errors():
        _show(fetch(url, "/status"), as_json, show)


def plan(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print it.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Plan for the load of this trace instead; changes nothing.")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Print the plan that leads from the running placement to a better one, and have it carried out."""
    with plain_errors():
        if trace is not None:
            from services.cli.replay import replay

            report = replay(trace, fetch(url, "/admin/placement", admin_key))
        else:
            report = fetch(url, "/admin/plan", admin_key)
            if not dry_run:
                report |= fetch(url, "/admin/rebalance", admin_key, {"by": _by()})

    def show(told: Any) -> None:
        typer.echo(told["text"])
        if "order" in told:
            typer.echo("The controller was asked to carry it out, as the load is at its next turn.")

    _show(report, as_json, show)


def rebalance(url: Url = DEFAULT_URL, admin_key: Key = "", as_json: AsJson = False) -> None:
    """Have the controller plan at once, and move experts for any gain."""
    with plain_errors():
        report = fetch(url, "/admin/rebalance", admin_key, {"by": _by()})
    _show(report, as_json, lambda _: typer.echo("The controller plans at its next turn."))


def scale(
    pool: Annotated[str, typer.Argument(help="Name of the pool.")],
    shards: Annotated[int | None, typer.Argument(min=1, help="How many it is to have.", show_default=False)] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Take the order back: scale by load.")] = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Have a pool grow or shrink to so many shards."""
    with plain_errors():
        if auto == (shards is not None):
            raise ValueError("scale needs either a number of shards or --auto, which leaves the number to the load")
        report = fetch(url, f"/admin/pools/{quote(pool, safe='')}/scale", admin_key, {"shards": shards, "by": _by()})
    sentence = f"{pool} is scaled by its load." if auto else f"{pool} was ordered to have {shards} shards."
    _show(report, as_json, lambda _: typer.echo(sentence))


def drain(
    shard: Annotated[str, typer.Argument(help="Id of the shard; `expertmesh status` lists them.")],
    undo: Annotated[bool, typer.Option("--undo", help="Use it again.")] = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Have a shard's experts moved elsewhere; it runs on, empty, until --undo."""
    with plain_errors():
        report = fetch(url, f"/admin/shards/{quote(shard, safe='')}/drain", admin_key, {"undo": undo, "by": _by()})
    stood = report.get("lifted", True)
    done = "may hold experts again" if stood else "was not ordered to drain"
    sentence = f"{shard} {done}." if undo else f"{shard} is being emptied; `expertmesh status` tells how far it is."
    _show(report, as_json, lambda _: typer.echo(sentence))


def load(
    top: Annotated[int, typer.Option(min=1, max=1000, help="How many experts.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Of every expert by layer, as JSON.")] = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show the experts that are picked most."""
    with plain_errors():
        report = fetch(url, "/admin/load" if everything else f"/admin/load?top={top}", admin_key)
    _show(report, as_json or everything, lambda told: console.print(load_table(told)))


def decisions(
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest first.")] = 20,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show what the controller decided, and why."""
    with plain_errors():
        report = fetch(url, f"/admin/decisions?count={count}", admin_key)
    _show(report, as_json, lambda told: console.print(decisions_table(told["decisions"])))


def trace(
    action: Annotated[str, typer.Argument(help="start or stop")],
    max_seconds: Annotated[float, typer.Option(help="It stops by itself after so long.")] = 60.0,
    max_mib: Annotated[int, typer.Option(min=1, max=1024, help="Or when the file is so large.")] = 64,
    url: Url = DEFAULT_URL,
    admin_key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Record which experts are picked, in a file on each backbone's machine, for `plan --trace`."""
    with plain_errors():
        if action not in ("start", "stop"):
            raise ValueError(f"trace {action!r} is neither start nor stop")
        bounds = {"max_bytes": max_mib << 20, "max_seconds": max_seconds} if action == "start" else {}
        report = fetch(url, "/admin/traces", admin_key, {"action": action, **bounds})

    def show(told: Any) -> None:
        for one in told["backbones"]:
            typer.echo(f"{one.get('endpoint', '?')}: {_recording(one)}")

    _show(report, as_json, show)


def _recording(one: dict[str, Any]) -> str:
    if not one.get("path"):
        return str(one.get("error", "nothing was recorded"))
    if one["is_recording"]:
        return f"records into {one['path']}"
    return f"{one['path']}: {one['num_calls']} calls, {one['num_dropped']} left out; {one['why_ended']}"


def drill(
    kill: Annotated[str, typer.Option("--kill", help="What is killed: shard.")],
    load: Annotated[bool, typer.Option("--under-load", help="While requests are answered.")] = False,
    shard: Annotated[str, typer.Option(help="Its id; the one with most picks if left out.")] = "",
    rate: Annotated[float, typer.Option(min=0.01, max=1000, help="Requests per second.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=5, max=3600, help="Of load, of which there are two runs.")] = 40.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each request.")] = 32,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Kill a shard of this machine with SIGKILL, and tell what requests noticed of it; exit code 1 if they did.

    Run it at no more than 60 % of what the server can do: beyond that requests wait for each other, shard or no shard.
    """
    from services.cli.drill.shard_drill import Drilled, drill_shard

    with plain_errors():
        if kill != "shard":
            raise ValueError(f"--kill is {kill!r}; the only thing that a drill kills is a shard")
        if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"--url is {url}, but a drill kills processes of this machine: use http://127.0.0.1:PORT")
        drilled: Drilled = asyncio.run(drill_shard(url, shard, (rate, seconds, max_tokens) if load else None))
    _show(drilled.to_dict(), as_json, lambda _: typer.echo(drilled.describe()))
    if not drilled.is_unnoticed:
        raise typer.Exit(1)
