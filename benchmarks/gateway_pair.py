"""`gateway_pair` runs one gateway and one backbone, each in its own process, without Ray and without shards.

The other benchmarks run `expertmesh up`. Here, no other process of the server takes time from the two measured ones.
Each of the two processes measures its own delays: the gateway how long its event loop is blocked, and the backbone how
long the steps of its engine take.
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
from model.families.registry import load_family
from services.args import AppArgs
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.contract.token_output import TokenOutput
from services.engine.engine import Engine
from services.engine.grammar.grammar_checker import GrammarChecker
from services.engine.server import EngineServer
from services.gateway.backbones.backbone_pool import BackbonePool
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation, ModelCard
from services.gateway.listener import Listener, ListenerConfig
from services.gateway.ports.health_api import HealthApi
from services.gateway.rest import build_rest

START_TIMEOUT_S, STOP_TIMEOUT_S = 300, 10
LOOP_PERIOD_S = 0.01  # seconds between two looks at the gateway's event loop


@dataclass(frozen=True)
class GatewayPair:
    """A `GatewayPair` has the addresses of a gateway's APIs, and the two processes.

    - `longest_block`: returns for how many seconds the gateway's event loop was blocked at most since the last call.
    - `longest_step`: returns how many seconds the longest engine step took that ended since the last call.
    """

    url: str
    grpc_address: str
    gateway_pid: int
    backbone_pid: int
    longest_block: Callable[[], float]
    longest_step: Callable[[], float]


@dataclass
class Longest:
    """A `Longest` keeps the longest time that was added since the last call of `take`."""

    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.seconds = max(self.seconds, seconds)

    def take(self) -> float:
        longest, self.seconds = self.seconds, 0.0
        return longest


@dataclass(frozen=True)
class Served:
    """A `Served` is a process that serves requests, with the text that the process sent when it was ready."""

    pid: int
    text: str
    pipe: Connection

    def ask(self) -> float:
        """Return the longest time that the process measured since the last call."""
        self.pipe.send(None)
        return float(self.pipe.recv())


@contextmanager
def gateway_pair(args: AppArgs) -> Iterator[GatewayPair]:
    """Run a gateway and a backbone with local experts during the block, and yield their addresses."""
    http_port, grpc_port = free_port(), free_port()
    args = args.model_copy(update={"experts": "local", "http_port": http_port, "grpc_port": grpc_port})
    url, grpc_address = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"
    with served(run_backbone, args) as backbone, served(run_gateway, args, backbone.text) as gateway:
        yield GatewayPair(url, grpc_address, gateway.pid, backbone.pid, gateway.ask, backbone.ask)


@contextmanager
def served(work: Callable[..., None], *args: Any) -> Iterator[Served]:
    """Run `work` in a new process during the block. `work` sends a text as soon as it serves requests."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args))  # no daemon, because a gateway starts processes
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError(f"{work.__name__} did not serve requests within {START_TIMEOUT_S} s")
        assert process.pid is not None
        yield Served(process.pid, ours.recv(), ours)
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
        backbone, steps = Backbone(config, family, None, None), Longest()
        backbone.engine.step = _timed(backbone.engine, steps)  # type: ignore[method-assign]
        await backbone.start()
        server = EngineServer(backbone.engine, "127.0.0.1")
        pipe.send(await server.start())
        await _answer(pipe, steps)
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
        blocks = Longest()
        watching = asyncio.create_task(_watch_loop(blocks))
        await _answer(pipe, blocks)
        watching.cancel()
        await listener.stop()
        await pool.stop()
        grammars.close()

    asyncio.run(run())


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which then closes the pipe


def _timed(engine: Engine, steps: Longest) -> Callable[[], list[TokenOutput]]:
    """Return `engine.step` as a function that adds the time of each step to `steps`.

    While the engine has work, the time of a step begins with the end of the step before. Thus it includes the work that
    the engine's thread does between two steps: to deliver outputs, and to take in requests.
    """
    step, last_end = engine.step, 0.0

    def timed_step() -> list[TokenOutput]:
        nonlocal last_end
        began = last_end or time.perf_counter()
        try:
            return step()
        finally:
            ended = time.perf_counter()
            steps.add(ended - began)
            last_end = ended if engine.scheduler.has_work else 0.0

    return timed_step


async def _watch_loop(blocks: Longest) -> None:
    """Sleep again and again, and add to `blocks` how much later than planned the event loop went on."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LOOP_PERIOD_S)
        blocks.add(time.perf_counter() - began - LOOP_PERIOD_S)


async def _answer(pipe: Connection, longest: Longest) -> None:
    """Send the longest time for each message from `pipe`, until the other end of `pipe` is closed."""
    loop, closed = asyncio.get_running_loop(), asyncio.Event()

    def answer() -> None:
        try:
            pipe.recv()
        except EOFError:
            loop.remove_reader(pipe.fileno())
            closed.set()
        else:
            pipe.send(longest.take())

    loop.add_reader(pipe.fileno(), answer)
    await closed.wait()
