"""The command line: the commands, and what is set before any of them runs."""

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
RAY_DEFAULTS = {  # read when Ray is imported, and inherited by every process it starts
    "RAY_SERVE_LOG_TO_STDERR": "0",  # logs go to files under the session's folder; the terminal is the user's
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that spins while it waits takes the core that another process needs
    "KMP_BLOCKTIME": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 is for batch work; these processes answer people
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
    # A short help is wrapped to the width of the terminal; a summary that is taken from the docstring is cut to it.
    app.command(name, short_help=(command.__doc__ or "").partition("\n")[0])(command)


def check_own_packages() -> None:
    """PyPI has packages of the same names; imported by mistake they would fail in strange ways."""
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
