"""The command `expertmesh size` tells how many GPUs a model needs, from the model's config and its files' headers.

The command starts nothing and reads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from cluster.sizing.fit import Slo
from cluster.sizing.gpus import GPUS, Gpu, gpu_of
from cluster.sizing.known_models import find_model, known_config, known_models
from cluster.sizing.model_sizes import ModelSizes, model_sizes
from cluster.sizing.sizing import Sizing, size, sizing_of
from cluster.sizing.weight_formats import Dtype, dtype_of, with_hf_quantization
from model.configs.model_files import CONFIG, QUANTIZATION, read_json
from services.cli.size_tables import LEGEND, all_table, size_tables
from services.cli.terminal import AsJson, console, plain_errors, progress
from services.hub import Repository

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DEFAULT = Slo()


def size_model(
    model: Annotated[
        str,
        typer.Option(help="Model directory, config.json, part of a public model's name, ORG/NAME on the hub, or all."),
    ],
    gpu: Annotated[str, typer.Option(help=f"GPU: one of {', '.join(GPUS)}.")] = "h200",
    dtype: Annotated[
        str, typer.Option(help=f"Format of the weights: {', '.join(DTYPES)}, or auto for the format of the checkpoint.")
    ] = "auto",
    requests: Annotated[
        int, typer.Option(help="Number of requests that are answered at the same time.")
    ] = DEFAULT.num_requests,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a request, prompt and answer together. Default: 8192, or the model's limit if it is lower."
        ),
    ] = None,
    itl_ms: Annotated[
        float, typer.Option(help="Longest time between two tokens of a request, in milliseconds.")
    ] = DEFAULT.itl_ms,
    call_ms: Annotated[
        float, typer.Option(help="Milliseconds that a layer call takes in addition to the shards' computing.")
    ] = DEFAULT.call_ms,
    min_backbones: Annotated[
        int, typer.Option(help="Minimum number of backbones. With two backbones, one may die.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Tell how many GPUs and how much memory and network a model needs.

    The answer follows from the model's config and, if they are there, from the headers of its weight files. No weights
    are read.
    """
    with plain_errors():
        slo = Slo(requests, DEFAULT.context_len if context is None else context, itl_ms, min_backbones, call_ms)
        if model == "all":
            _show_all({name: known_config(name) for name in known_models()}, gpu_of(gpu), dtype, slo, as_json)
            return
        name, config, directory = read_config(model)
        sizes = model_sizes(config, directory)
        if context is None:
            slo = replace(slo, context_len=min(slo.context_len, sizes.max_context))
        wanted = _dtype(dtype) or (sizes.files.dtype if sizes.files else dtype_of(config))
        _show_one(name, sizes, sizing_of(sizes, gpu_of(gpu), wanted, slo), slo, as_json)


def read_config(model: str) -> tuple[str, dict[str, Any], Path | None]:
    """Return the name and the config of a model, and the directory that may have its weights.

    `model` is the path of a model directory, the path of a config file, a part of a public model's name, or the name of
    a repository, of which only the configs are downloaded. The config has the quantization from a file
    `hf_quant_config.json`. Raises ValueError with one sentence if there is no such model or if the config cannot be
    read.
    """
    path = Path(model)
    is_directory = path.is_dir()
    repository = Repository.parse(model)
    if is_directory:
        path /= CONFIG
    elif repository and not path.is_file():
        with progress() as say:
            path = repository.directory(say, (CONFIG, QUANTIZATION)) / CONFIG
            is_directory = True
    elif not path.is_file():
        return find_model(model), known_config(model), None
    config = read_json(path)
    beside = path.with_name(QUANTIZATION)
    if is_directory and beside.is_file():
        config = with_hf_quantization(config, read_json(beside))
    directory = path.parent if is_directory else None
    if repository:
        return repository.id, config, directory
    return path.resolve().parent.name if path.name == CONFIG else path.stem, config, directory


def _dtype(name: str) -> Dtype | None:
    """Return the dtype called `name`; None for "auto"."""
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    if name != "auto":
        raise ValueError(f"--dtype is {name!r}; allowed are auto, {', '.join(DTYPES)}")
    return None


def _show_one(name: str, model: ModelSizes, made: Sizing, slo: Slo, as_json: bool) -> None:
    if as_json:
        parts = {"params": model.params, "stored_bytes": model.stored(made.dtype)}
        typer.echo(json.dumps({"model": name, **made.to_dict(), **parts}, indent=2))
        return
    for table in size_tables(name, model, made, slo):
        console.print(table)
    _say(made.reasons)


def _show_all(configs: Mapping[str, Mapping[str, Any]], gpu: Gpu, dtype: str, slo: Slo, as_json: bool) -> None:
    """Print one line for each model in the format `dtype`, or one line for each model and format if `dtype` is auto."""
    rows: list[tuple[str, Dtype, Sizing | str]] = []
    for name, config in configs.items():
        for one in (wanted,) if (wanted := _dtype(dtype)) else DTYPES:
            try:
                rows.append((name, one, size(config, gpu, one, slo)))
            except ValueError as error:
                rows.append((name, one, str(error)))
    if as_json:
        reports = [
            {"model": name, "dtype": one, **({"error": made} if isinstance(made, str) else made.to_dict())}
            for name, one, made in rows
        ]
        typer.echo(json.dumps(reports, indent=2))
        return
    console.print(all_table(gpu.name, slo, rows))
    _say([LEGEND])
    _say(f"{name} in {one}: {made}." for name, one, made in rows if isinstance(made, str))


def _say(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        console.print(f"• {sentence}", soft_wrap=False)
