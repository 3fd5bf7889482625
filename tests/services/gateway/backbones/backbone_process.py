"""A `BackboneProcess` is a process with a backbone and the demo model, which tests can kill, suspend and stop."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch

from model.demo import DEMO
from model.families.registry import load_family
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.scheduling.memory import plan_memory
from services.engine.scheduling.scheduled_batch import ScheduledBatch, StepResult
from services.engine.server import EngineServer
from services.gateway.backbones.backbone_pool import BackbonePool
from tests.services.forkserver import CONTEXT

MAX_LEN = 512
START_TIMEOUT_S = 60


class BackboneProcess:
    """A `BackboneProcess` starts a process with a backbone, and `endpoint` waits until the backbone serves.

    Each step of the engine takes `pause_s` seconds longer than usual.
    """

    def __init__(self, pause_s: float, draft_tokens: int | None = None) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_main, args=(theirs, pause_s, draft_tokens), daemon=True)
        self._process.start()
        theirs.close()
        self._endpoint = ""
        self._is_stopped = self._is_ending = False

    @property
    def endpoint(self) -> str:
        if not self._endpoint:
            assert self._pipe.poll(START_TIMEOUT_S), "the backbone does not start"
            self._endpoint = self._pipe.recv()
        return self._endpoint

    @property
    def answers(self) -> bool:
        return self._process.is_alive() and not (self._is_stopped or self._is_ending)

    def stats(self) -> dict[str, Any]:
        self._pipe.send("stats")
        assert self._pipe.poll(START_TIMEOUT_S)
        stats: dict[str, Any] = self._pipe.recv()
        return stats

    def wait_until_idle(self, timeout_s: float = 30) -> None:
        stop_at = time.monotonic() + timeout_s
        while any((stats := self.stats())[name] for name in ("num_running", "num_waiting", "num_slots_taken")):
            assert time.monotonic() < stop_at, stats
            time.sleep(0.05)

    def send(self, signal_number: signal.Signals) -> None:
        pid = self._process.pid
        assert pid
        os.kill(pid, signal_number)
        self._is_stopped = signal_number is signal.SIGSTOP
        if signal_number is signal.SIGKILL:
            self._process.join(10)

    def stop(self) -> None:
        """Tell the backbone to stop, as Ray Serve tells a replica to stop, and return at once."""
        self._is_ending = True
        self._pipe.send("stop")

    def close(self) -> None:
        if self._process.is_alive():
            self.send(signal.SIGKILL)
        self._process.close()
        self._pipe.close()


class Replicas:
    """A `Replicas` holds two backbones; `refill` replaces the backbones that a test killed, suspended or stopped."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self.all = [BackboneProcess(pause_s, draft_tokens) for draft_tokens in (None, 0)]
        for one in self.all:
            assert one.endpoint

    async def ask(self) -> list[dict[str, Any]]:
        """Return the statuses of the backbones that answer, as the gateway would get the statuses from Ray Serve.

        Dead and hung backbones do not answer.
        """
        return [{"endpoint": one.endpoint, "engine": {"is_healthy": True}} for one in self.all if one.answers]

    def busiest(self, backbones: BackbonePool) -> BackboneProcess:
        def num_requests(one: BackboneProcess) -> int:
            stream = backbones._streams.get(one.endpoint)
            return stream.num_requests if stream and stream.is_open else 0

        return max((one for one in self.all if one.answers), key=num_requests)

    def refill(self) -> None:
        over = [one for one in self.all if not one.answers]
        self.all = [one for one in self.all if one.answers]
        for one in over:
            one.close()
        new = [BackboneProcess(self._pause_s) for _ in range(2 - len(self.all))]
        for one in new:
            assert one.endpoint
        # New backbones are added only when they serve, because gateways in other threads read all endpoints.
        self.all += new

    def close(self) -> None:
        for one in self.all:
            one.close()


def _main(pipe: Connection, pause_s: float, draft_tokens: int | None) -> None:
    faulthandler.dump_traceback_later(START_TIMEOUT_S / 2)  # print the stacks of a start that hangs
    torch.set_num_threads(1)
    asyncio.run(_serve(pipe, pause_s, draft_tokens))


async def _serve(pipe: Connection, pause_s: float, draft_tokens: int | None) -> None:
    family = load_family(DEMO)
    memory = plan_memory(family.config.state_spec, torch.float32, 64 << 20, MAX_LEN, 16)
    config = BackboneConfig(torch.float32, "cpu", MAX_LEN, 256, memory, num_threads=1, draft_tokens=draft_tokens)
    backbone = Backbone(config, family, None, None)
    await backbone.start()
    _slow_down(backbone, pause_s)
    server = EngineServer(backbone.engine, "127.0.0.1")
    pipe.send(await server.start())
    faulthandler.cancel_dump_traceback_later()
    while (command := await asyncio.to_thread(_receive, pipe)) == "stats":
        pipe.send(asdict(backbone.engine.stats()))
    if command == "stop":
        await server.stop()
        await backbone.stop()


def _receive(pipe: Connection) -> str:
    try:
        command: str = pipe.recv()
    except EOFError:
        return "the test is gone"
    return command


def _slow_down(backbone: Backbone, pause_s: float) -> None:
    run = backbone.engine.runner.run

    def run_slowly(batch: ScheduledBatch) -> list[StepResult]:
        time.sleep(pause_s)
        return run(batch)

    backbone.engine.runner.run = run_slowly  # type: ignore[method-assign]
