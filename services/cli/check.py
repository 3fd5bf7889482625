"""The command `expertmesh check` tells whether a model directory can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.terminal import console, plain_errors


def check(model: Annotated[str, typer.Option(help="Hugging Face model directory to check.")]) -> None:
    """Tell whether a model directory is complete and can be served.

    No weights are read.
    """
    with plain_errors():
        from services.args import AppArgs

        args = AppArgs(model=str(Path(model).resolve()), experts="local")
        family = args.check()
        num_experts = sum(shape.num_experts for shape in family.expert_shapes)
        console.print(f"{args.model} can be served: {num_experts:,} routed experts, none of its tensors is missing.")
        for note in args.notes(family):
            console.print(note)
