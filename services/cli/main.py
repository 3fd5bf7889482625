"""`main` makes the settings that every command in `COMMANDS` needs, and then runs the command line `expertmesh`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from services.cli.chat import chat
from services.cli.check import check
from services.cli.operator import decisions, drain, drill, load, plan, rebalance, scale, status, trace
from services.cli.size import size_model
from services.cli.up import up

COMMANDS: dict[str, Callable[..., None]] = {
    "up": up,
    "check": check,
    "chat": chat,
    "status": status,
    "plan": plan,
    "rebalance": rebalance,
    "scale": scale,
    "drain": drain,
    "load": load,
    "decisions": decisions,
    "trace": trace,
    "drill": drill,
    "size": size_model,
}
RAY_DEFAULTS = {  # environment variables; Ray reads them when it is imported, and its processes inherit them
    "RAY_SERVE_LOG_TO_STDERR": "0",  # logs go to files in the folder of the Ray session, not to the terminal
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep; spinning threads would take cores from other processes
    "KMP_BLOCKTIME": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 is for batch work, but people wait for these processes
    "TOKENIZERS_PARALLELISM": "false",
}
OURS = ("model", "cluster", "protos", "services")
ROOT = Path(__file__).resolve().parents[2]

app = typer.Typer(
    name="expertmesh",
    help="Serve Mixture-of-Experts language models with the experts apart from the rest of the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, command in COMMANDS.items():
    # Typer wraps a given `short_help`. Without `short_help`, Typer would cut off the docstring's first line.
    app.command(name, short_help=(command.__doc__ or "").partition("\n")[0])(command)


def check_own_packages() -> None:
    """Raise ValueError if Python finds a foreign package under the name of one of our packages.

    PyPI has packages of the same names. If Python imported such a package by mistake, the errors would be hard to
    understand.
    """
    for name in OURS:
        found = importlib.import_module(name).__file__
        if found is None or Path(found).resolve().parent.parent != ROOT:
            raise ValueError(
                f"the package {name!r} was imported from {found}, not from {ROOT}; another package shadows ours"
            )


def main() -> None:
    try:
        check_own_packages()
    except ValueError as error:
        sys.exit(f"expertmesh: {error}")
    os.environ |= {name: value for name, value in RAY_DEFAULTS.items() if name not in os.environ}
    app()
