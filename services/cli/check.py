"""The command `expertmesh check` tells whether a model directory can be served."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.terminal import console, plain_errors, progress
from services.hub import absolute_path


def check(
    model: Annotated[
        str,
        typer.Option(help="Hugging Face model directory, or ORG/NAME or ORG/NAME@REVISION, which is downloaded."),
    ],
    model_name: Annotated[
        str,
        typer.Option(help="Name by which clients would ask for the model. Default: ORG/NAME, or the directory's name."),
    ] = "",
) -> None:
    """Tell whether a model directory is complete and can be served.

    No weights are read, but a model that is not on this machine is downloaded.
    """
    with plain_errors():
        from services.args import AppArgs

        with progress() as say:
            args = AppArgs(model=absolute_path(model), model_name=model_name, experts="local").resolved(say)
        family = args.check()
        num_experts = sum(shape.num_experts for shape in family.expert_shapes)
        console.print(f"{args.model} can be served: {num_experts:,} routed experts, none of its tensors is missing.")
        for note in args.notes(family):
            console.print(note)
