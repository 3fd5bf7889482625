"""The command line."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli import operator, size
from services.cli.terminal import DEFAULT_URL, Url, console, fetch, plain_errors

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
app.add_typer(operator.app)
app.add_typer(size.app)


def check_own_packages() -> None:
    """PyPI has packages of the same names; imported by mistake they would fail in strange ways."""
    for name in OURS:
        found = importlib.import_module(name).__file__
        if found is None or Path(found).resolve().parent.parent != ROOT:
            raise ValueError(
                f"the package {name!r} was imported from {found}, not from {ROOT}; another package shadows ours"
            )


@app.command()
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


@app.command()
def check(model: Annotated[str, typer.Option(help="Hugging Face model directory.")]) -> None:
    """Tell whether a model directory is whole and can be served. Reads no weights."""
    with plain_errors():
        from services.args import AppArgs

        args = AppArgs(model=str(Path(model).resolve()), experts="local")
        family = args.check()
        num_experts = sum(shape.num_experts for shape in family.expert_shapes)
        console.print(f"{args.model} can be served: {num_experts:,} routed experts, none of its tensors is missing.")


@app.command()
def chat(
    message: Annotated[str, typer.Argument(help="One message; a conversation on the terminal if left out.")] = "",
    url: Url = DEFAULT_URL,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
) -> None:
    """Talk to a running server."""
    with plain_errors():
        model = fetch(url, "/v1/models")["data"][0]["id"]
        messages: list[dict[str, str]] = []
        while text := message or _ask():
            messages.append({"role": "user", "content": text})
            answer = _stream_answer(
                url, {"model": model, "max_tokens": max_tokens, "temperature": temperature}, messages
            )
            messages.append({"role": "assistant", "content": answer})
            if message:
                return


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _stream_answer(url: str, options: dict[str, Any], messages: list[dict[str, str]]) -> str:
    from openai import APIError, OpenAI

    client = OpenAI(base_url=url.rstrip("/") + "/v1", api_key="none", max_retries=0)
    pieces = []
    try:
        stream: Any = client.chat.completions.create(messages=messages, stream=True, **options)  # type: ignore[arg-type]
        for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
    except APIError as error:
        raise ValueError(error.message) from None
    print()
    return "".join(pieces)


def main() -> None:
    try:
        check_own_packages()
    except ValueError as error:
        sys.exit(f"expertmesh: {error}")
    os.environ |= {name: value for name, value in RAY_DEFAULTS.items() if name not in os.environ}
    app()
