"""The command `expertmesh up` starts the whole application on this machine and serves until Ctrl-C."""

from __future__ import annotations

import math
import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.start_display import showing
from services.cli.start_steps import StartReporter, StartStep, StepReport, steps_to_show
from services.cli.terminal import console, plain_errors
from services.gateway.limits import GatewayLimits
from services.hub import absolute_path

if TYPE_CHECKING:  # `checked_args` imports AppArgs later, because importing torch takes seconds
    from services.args import AppArgs


def up(
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face model directory, or ORG/NAME or ORG/NAME@REVISION, which is downloaded. Default: the "
            "demo model."
        ),
    ] = "",
    model_name: Annotated[
        str,
        typer.Option(help="Name by which clients ask for the model. Default: ORG/NAME, or the name of its directory."),
    ] = "",
    shards: Annotated[int, typer.Option(min=1, help="Number of expert shards; each is a process of its own.")] = 3,
    max_shards: Annotated[
        int | None,
        typer.Option(min=1, help="Number of shards to grow to when --shards are too busy. Default: no growth."),
    ] = None,
    backbones: Annotated[
        int,
        typer.Option(min=1, help="Number of backbone replicas. If one of several dies, no request fails."),
    ] = 1,
    controllers: Annotated[
        int, typer.Option(min=1, help="Number of controllers. If the leading controller dies, another takes over.")
    ] = 1,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic: float32, bfloat16 or auto, which is float32 on a CPU and bfloat16 on cuda.")
    ] = "auto",
    port: Annotated[int, typer.Option(min=1, max=65535, help="REST port on 127.0.0.1.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="gRPC port on 127.0.0.1.")] = 9000,
    redis_url: Annotated[
        str, typer.Option(help="Store: redis://host:port, or embedded:// to start a server on this machine.")
    ] = "embedded://",
    ray_address: Annotated[
        str, typer.Option(help="Address of a running Ray cluster to join. Default: a new local cluster is started.")
    ] = "",
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Maximum length in tokens of a prompt with its completion. Default: the model's limit."
        ),
    ] = None,
    state_memory: Annotated[
        str, typer.Option(help="Memory for the KV cache and recurrent states of requests, such as 4GiB.")
    ] = "",
    shard_memory: Annotated[
        str,
        typer.Option(help="Memory of one shard for experts. Default: enough for all experts if one shard dies."),
    ] = "",
    keep_groups: Annotated[
        bool,
        typer.Option(
            "--keep-groups", help="Keep the experts of a router's group on few shards, for models such as DeepSeek-V3."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Device of the backbone and of every shard: cpu or cuda.")] = "cpu",
    max_requests: Annotated[
        int, typer.Option(min=1, help="Maximum number of requests computed at once, if the memory suffices.")
    ] = 64,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=16,
            help="Maximum number of draft tokens per request and step; 0: no drafts. Default: chosen by measurement.",
        ),
    ] = None,
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Compute every prompt from its start.")
    ] = False,
    no_generation_config: Annotated[
        bool,
        typer.Option(
            "--no-generation-config", help="Ignore the sampling defaults in the model's generation_config.json."
        ),
    ] = False,
    log_format: Annotated[
        str, typer.Option(help="Format of the processes' logs: json (one object a line) or text.")
    ] = "json",
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose web pages may call the REST API (CORS), such as https://chat.example.org, or *; may be "
            "repeated. Default: none."
        ),
    ] = None,
    keep_alive_s: Annotated[
        float, typer.Option(help="Seconds for which an idle connection to the REST port stays open.")
    ] = 5,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A limit on requests, such as body_s=30; may be repeated. docs/api.md lists the limits.",
        ),
    ] = None,
    local_experts: Annotated[
        bool, typer.Option("--local-experts", help="Compute the experts in the backbone, without shards.")
    ] = False,
) -> None:
    """Start everything on this machine and serve until Ctrl-C."""
    options: dict[str, Any] = {
        "model_name": model_name,
        "dtype": dtype,
        "redis_url": redis_url,
        "max_model_len": max_model_len,
        "experts": "local" if local_experts else "remote",
        "device": device,
        "state_memory": state_memory or None,
        "max_requests": max_requests,
        "draft_tokens": draft_tokens,
        "prefix_cache": not no_prefix_cache,
        "generation_config": not no_generation_config,
        "log_format": log_format,
        "backbone_replicas": backbones,
        "controller_replicas": controllers,
        "keep_alive_s": keep_alive_s,
        "allowed_origins": allowed_origins or [],
        "placement": {"keep_groups": keep_groups},
        "pools": [
            {
                "name": f"experts-{device}",
                "shards": shards,
                "max_shards": max_shards,
                "device": device,
                "memory_budget": shard_memory or None,
            }
        ],
    }
    if model:
        options["model"] = absolute_path(model)
    with plain_errors():
        options["limits"] = GatewayLimits.parse(limit or [])
        _serve(options, port, grpc_port, ray_address or None)


def _serve(options: dict[str, Any], port: int, grpc_port: int, ray_address: str | None) -> None:
    _stop_on_signals()
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            with showing(console, steps_to_show(options["experts"] == "local", bool(ray_address))) as reporter:
                args = checked_args(options, reporter, is_joining=bool(ray_address))
                from services.cli.local_application import Ports, logs_path, running

                stack.enter_context(running(args, Ports(port, grpc_port), reporter, ray_address))
            _stop_on_signals()  # called again, because Ray has installed its own handlers
            console.print(f"Ready after {time.monotonic() - started:.0f} s. Ctrl-C stops it.")
            console.print(f"  REST  http://127.0.0.1:{port}/v1   (OpenAI-compatible; model {args.name!r})")
            console.print(f"  gRPC  127.0.0.1:{grpc_port}   (expertmesh.inference.v1.Inference)")
            key = "open to EXPERTMESH_ADMIN_KEY" if args.admin_key else "closed: EXPERTMESH_ADMIN_KEY is not set"
            console.print(f"  admin http://127.0.0.1:{port}/admin   ({key})")
            console.print(f"  logs  {logs_path()}   (worker-*.err, {args.log_format})")
            signal.pause()
    except KeyboardInterrupt:
        console.print("Stopped.")


def checked_args(options: dict[str, Any], reporter: StartReporter, is_joining: bool) -> AppArgs:
    """Check the model, print how the application will run, and return the application's arguments.

    A model on a hub is downloaded here, before Ray starts. The nodes of a cluster that is joined may not share this
    machine's disk. So each of them finds or downloads the files itself, at the commit that is checked here.
    """
    reporter.report(StepReport(StartStep.MODEL, "looking for the checkpoint"))
    from services.args import AppArgs

    asked = AppArgs(**options)
    if not is_joining:
        check_gpus_of_this_machine(asked)
    args = asked.resolved(lambda news: reporter.report(StepReport(StartStep.MODEL, news, is_news=True)))
    reporter.report(StepReport(StartStep.MODEL, "checking the checkpoint"))
    family = args.check()
    args = args.without_idle_shards(family)
    reporter.report(StepReport(StartStep.MODEL, "complete, can be served", is_done=True))
    console.print(f"Memory for requests: {args.memory_plan(family)}.")
    console.print(f"Arithmetic: {'; '.join(args.arithmetic())}.")
    for note in args.notes(family):
        console.print(note)
    if not family.has_mtp:
        console.print("This checkpoint has no MTP weights: it is served without drafting.")
    elif args.draft_tokens == 0:
        console.print("Drafting is off.")
    dtype = str(args.torch_dtype).removeprefix("torch.")
    console.print(f"Starting {args.name} from {args.model}: {_expert_tier(args)}, {dtype}.")
    return asked.pinned(args).without_idle_shards(family) if is_joining else args


def check_gpus_of_this_machine(args: AppArgs) -> None:
    """Raise ValueError if this machine has fewer usable GPUs than the application reserves.

    Without this check, Ray would wait forever for the missing GPUs, or start processes that fail again and again.
    """
    import torch

    pools = args.pools if args.experts == "remote" else []
    num_needed = math.ceil(args.gpus * args.backbone_replicas + sum(pool.gpus * pool.shards for pool in pools))
    if not num_needed:
        return
    if torch.version.cuda is None:
        raise ValueError(
            f"--device cuda needs a PyTorch with CUDA, but PyTorch {torch.__version__} was built without CUDA; "
            "install a PyTorch with CUDA, or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda needs a GPU, but PyTorch {torch.__version__} finds none that it can use; check that "
            f"nvidia-smi lists a GPU and that its driver supports CUDA {torch.version.cuda}, or use --device cpu"
        )
    if (num_found := torch.cuda.device_count()) < num_needed:
        shards = f" and the shards ({sum(pool.shards for pool in pools)})" if pools else ""
        raise ValueError(
            f"the backbones ({args.backbone_replicas}){shards} need {num_needed} GPUs, but this machine has "
            f"{num_found}; use fewer --backbones or --shards, or --local-experts, or --device cpu"
        )


def _expert_tier(args: AppArgs) -> str:
    if args.experts == "local":
        return "experts in the backbone"
    return f"{sum(pool.shards for pool in args.pools)} expert shards, store {args.shown_redis_url}"


def _stop_on_signals() -> None:
    """Make Ctrl-C and SIGTERM stop the server.

    A shell makes the processes that it starts in the background (`expertmesh up &`) ignore SIGINT, so the handler for
    SIGINT is set here.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
