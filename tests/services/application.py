"""For tests, the class `Application` runs `expertmesh up`, and the function `expertmesh` runs any other command."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc
import httpx
from openai import OpenAI

from protos.expertmesh.inference.v1 import inference_pb2_grpc
from tests.services.demo import DEMO, MODEL
from tests.services.processes import descendants

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "services.cli"]
ENVIRONMENT = {**os.environ, "EXPERTMESH_ADMIN_KEY": "the key of these tests"}  # environment of servers and commands
START_TIMEOUT_S, STOP_TIMEOUT_S = 240.0, 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def expertmesh(*arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run one `expertmesh` command until it ends and return its exit code and output."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s
    )


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> bool:
    stop_at = time.monotonic() + timeout_s
    while not (done := is_true()) and time.monotonic() < stop_at:
        time.sleep(0.1)
    return done


class Application:
    """An `Application` is a running `expertmesh up` with its own process group, like a command in a terminal."""

    def __init__(self, num_shards: int, *options: str) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.url, self.grpc_target = f"http://127.0.0.1:{self.port}", f"127.0.0.1:{self.grpc_port}"
        chosen = [] if MODEL == DEMO else ["--model", str(MODEL), "--model-name", "demo"]
        ports = ["--port", str(self.port), "--grpc-port", str(self.grpc_port)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed on exit
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            [*COMMAND, "up", "--shards", str(num_shards), "--dtype", "float32", *ports, *chosen, *options],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_until_ready(self) -> float:
        """Wait until the application prints that it is ready, and return the seconds since the application's start."""
        is_over = lambda: "Ready after" in self.output or self.process.poll() is not None  # noqa: E731
        wait_until(is_over, START_TIMEOUT_S)
        assert "Ready after" in self.output, self.output
        return time.monotonic() - self.started_at

    @property
    def output(self) -> str:
        """Return everything that the application has printed so far."""
        self._log.seek(0)
        return self._log.read()

    @property
    def redis(self) -> tuple[int, str]:
        """Return the process id and the URL of the store that the application started."""
        for pid, command in descendants(self.process.pid).items():
            if found := re.search(r"(?:redis|valkey)-server 127\.0\.0\.1:(\d+)$", command):
                return pid, f"redis://127.0.0.1:{found[1]}/0"
        raise AssertionError("the application runs no store")

    def status(self) -> Any:
        return httpx.get(f"{self.url}/status", timeout=10).raise_for_status().json()

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc_target)

    def press_ctrl_c(self) -> None:
        """Send SIGINT to the application's whole process group, as a terminal does after Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.press_ctrl_c()
            self.process.wait(STOP_TIMEOUT_S)
        self._log.close()


def inference(channel: grpc.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
