"""`gateway_pair` runs one gateway and one backbone, each in its own process, without Ray and without shards.

The other benchmarks run `expertmesh up`. Here, no other process of the server takes time from the two measured ones.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.server import free_port
from model.family import load_family
from services.args import AppArgs
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.grammar.grammar_checker import GrammarChecker
from services.engine.server import EngineServer
from services.gateway.backbones.backbone_pool import BackbonePool
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation, ModelCard
from services.gateway.listener import Listener, ListenerConfig
from services.gateway.ports.health_api import HealthApi
from services.gateway.rest import build_rest

START_TIMEOUT_S, STOP_TIMEOUT_S = 300, 10


@dataclass(frozen=True)
class GatewayPair:
    """A `GatewayPair` has the addresses of a gateway's APIs and the ids of the two processes."""

    url: str
    grpc_address: str
    gateway_pid: int
    backbone_pid: int


@contextmanager
def gateway_pair(args: AppArgs) -> Iterator[GatewayPair]:
    """Run a gateway and a backbone with local experts during the block, and yield their addresses."""
    http_port, grpc_port = free_port(), free_port()
    args = args.model_copy(update={"experts": "local", "http_port": http_port, "grpc_port": grpc_port})
    with (
        _process(run_backbone, args) as (backbone_pid, endpoint),
        _process(run_gateway, args, endpoint) as (gateway_pid, _),
    ):
        yield GatewayPair(f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", gateway_pid, backbone_pid)


@contextmanager
def _process(work: Callable[..., None], *args: Any) -> Iterator[tuple[int, str]]:
    """Run `work` in a new process; yield the process id and the text that `work` sends when it serves requests."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args))  # no daemon, because a gateway starts processes
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError(f"{work.__name__} did not serve requests within {START_TIMEOUT_S} s")
        assert process.pid is not None
        yield process.pid, ours.recv()
    finally:
        ours.close()  # asks the process to end
        process.join(STOP_TIMEOUT_S)
        process.kill()


def run_backbone(pipe: Connection, args: AppArgs) -> None:
    """Serve a backbone until the other end of `pipe` is closed."""
    _ignore_interrupts()
    family = load_family(args.model)
    config = BackboneConfig(
        dtype=args.torch_dtype,
        device=args.device,
        max_model_len=args.context(family),
        max_batch_tokens=args.max_batch_tokens,
        memory=args.memory_plan(family),
        num_threads=args.threads(family),
        draft_tokens=args.draft_tokens,
    )

    async def run() -> None:
        backbone = Backbone(config, family, None, None)
        await backbone.start()
        server = EngineServer(backbone.engine, "127.0.0.1")
        pipe.send(await server.start())
        await _closed(pipe)
        await server.stop()
        await backbone.stop()

    asyncio.run(run())


def run_gateway(pipe: Connection, args: AppArgs, endpoint: str) -> None:
    """Serve a gateway in front of the backbone at `endpoint` until the other end of `pipe` is closed."""
    _ignore_interrupts()
    family = load_family(args.model)

    async def statuses() -> list[dict[str, Any]]:
        return [{"endpoint": endpoint, "engine": {"is_healthy": True}}]

    async def run() -> None:
        pool, grammars = BackbonePool(statuses), GrammarChecker(args.model)
        card = ModelCard(args.name, args.context(family), int(time.time()))
        generation = Generation(pool, Tokenizer(args.model), card, grammars.check, limits=args.limits)
        await pool.start()
        config = ListenerConfig("127.0.0.1", args.http_port, args.grpc_port)
        listener = Listener(config, build_rest(generation, pool.health), generation, HealthApi(pool.health))
        await listener.start()
        gc.collect()
        gc.freeze()  # as in `GatewayDeployment`
        pipe.send("")
        await _closed(pipe)
        await listener.stop()
        await pool.stop()
        grammars.close()

    asyncio.run(run())


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which then closes the pipe


async def _closed(pipe: Connection) -> None:
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), closed.set)
    await closed.wait()
