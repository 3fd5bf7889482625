"""`expertmesh up`: everything on this machine, until Ctrl-C."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli.terminal import console, plain_errors


def up(
    model: Annotated[str, typer.Option(help="Hugging Face model directory; the demo model if left out.")] = "",
    model_name: Annotated[str, typer.Option(help="Name that clients use; the directory's if left out.")] = "",
    shards: Annotated[int, typer.Option(min=1, help="Expert shards, each a process of its own.")] = 3,
    max_shards: Annotated[
        int | None, typer.Option(min=1, help="As many where --shards would be too busy; --shards if left out.")
    ] = None,
    backbones: Annotated[int, typer.Option(min=1, help="Replicas of the backbone; one that dies loses nothing.")] = 1,
    controllers: Annotated[
        int, typer.Option(min=1, help="Replicas of the controller; where one dies, another takes over.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto is float32 on a CPU.")] = "auto",
    port: Annotated[int, typer.Option(min=1, max=65535, help="REST port on 127.0.0.1.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="gRPC port on 127.0.0.1.")] = 9000,
    redis_url: Annotated[
        str, typer.Option(help="redis://host:port, or embedded:// to start a server here.")
    ] = "embedded://",
    ray_address: Annotated[str, typer.Option(help="A running Ray cluster to join; a new local one if left out.")] = "",
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Longest prompt and completion together.")] = None,
    state_memory: Annotated[str, typer.Option(help="For requests' KV and recurrent state, such as 4GiB.")] = "",
    shard_memory: Annotated[
        str, typer.Option(help="For a shard's experts; enough without one shard if left out.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda, for the backbone and every shard.")] = "cpu",
    max_requests: Annotated[int, typer.Option(min=1, help="Computed at once, where memory allows.")] = 64,
    draft_tokens: Annotated[
        int | None,
        typer.Option(min=0, max=16, help="Drafted at most for a request; 0: none. Measured if left out."),
    ] = None,
    no_prefix_cache: Annotated[bool, typer.Option("--no-prefix-cache", help="Compute every prompt anew.")] = False,
    log_format: Annotated[str, typer.Option(help="json (one object a line) or text.")] = "json",
    local_experts: Annotated[bool, typer.Option("--local-experts", help="No shards: experts in the backbone.")] = False,
) -> None:
    """Start everything on this machine and serve until Ctrl-C."""
    with plain_errors():
        _up(
            _app_args(
                model=model,
                model_name=model_name,
                dtype=dtype,
                redis_url=redis_url,
                max_model_len=max_model_len,
                experts="local" if local_experts else "remote",
                device=device,
                state_memory=state_memory or None,
                max_requests=max_requests,
                draft_tokens=draft_tokens,
                prefix_cache=not no_prefix_cache,
                log_format=log_format,
                backbone_replicas=backbones,
                controller_replicas=controllers,
                pool={
                    "shards": shards,
                    "max_shards": max_shards,
                    "device": device,
                    "memory_budget": shard_memory or None,
                },
            ),
            port,
            grpc_port,
            ray_address,
        )


def _app_args(model: str, pool: dict[str, Any], **others: Any) -> Any:
    from services.args import AppArgs

    chosen = {"model": str(Path(model).resolve())} if model else {}
    args = AppArgs(pools=[{"name": f"experts-{pool['device']}", **pool}], **chosen, **others)
    family = args.check()
    console.print(f"Memory for requests: {args.memory_plan(family)}.")
    console.print(f"Arithmetic: {'; '.join(args.arithmetic())}.")
    if not family.has_mtp:
        console.print("This checkpoint has no MTP weights: it is served without drafting.")
    elif args.draft_tokens == 0:
        console.print("Drafting is off.")
    return args


def _up(args: Any, port: int, grpc_port: int, ray_address: str) -> None:
    from services.cli.local_application import Ports, logs_path, running

    _stop_on_signals()
    started = time.monotonic()
    console.print(
        f"Starting {args.name} from {args.model}: {_tier(args)}, {str(args.torch_dtype).removeprefix('torch.')}."
    )
    try:
        with running(args, Ports(port, grpc_port), ray_address or None):
            _stop_on_signals()  # again, because Ray has put handlers of its own in place
            console.print(f"Ready after {time.monotonic() - started:.0f} s. Ctrl-C stops it.")
            console.print(f"  REST  http://127.0.0.1:{port}/v1   (OpenAI-compatible; model {args.name!r})")
            console.print(f"  gRPC  127.0.0.1:{grpc_port}   (expertmesh.inference.v1.Inference)")
            key = "open to EXPERTMESH_ADMIN_KEY" if args.admin_key else "closed: EXPERTMESH_ADMIN_KEY is not set"
            console.print(f"  admin http://127.0.0.1:{port}/admin   ({key})")
            console.print(f"  logs  {logs_path()}   (worker-*.err, {args.log_format})")
            signal.pause()
    except KeyboardInterrupt:
        console.print("Stopped.")


def _stop_on_signals() -> None:
    """Ctrl-C and SIGTERM stop the server, also where a shell started it with SIGINT ignored (`expertmesh up &`)."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _tier(args: Any) -> str:
    if args.experts == "local":
        return "experts in the backbone"
    return f"{sum(pool.shards for pool in args.pools)} expert shards, store {args.shown_redis_url}"
