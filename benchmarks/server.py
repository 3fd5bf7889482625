"""`server` runs `expertmesh up` in a new process. Other functions measure memory and CPU time of processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx

READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 120
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Server:
    """A `Server` has the addresses of a running server's APIs and the process id of `expertmesh up`."""

    url: str
    grpc_address: str
    pid: int

    def status(self) -> dict[str, Any]:
        """Return the server's `/status`; `expertmesh status` shows the same data."""
        return fetch_json(f"{self.url}/status")

    def model_id(self) -> str:
        return str(fetch_json(f"{self.url}/v1/models")["data"][0]["id"])

    def processes(self) -> dict[int, str]:
        """Return the names of this server's processes, by process id."""
        return {pid: command_of(pid) for pid in [self.pid, *descendants(self.pid)]}


def fetch_json(url: str) -> dict[str, Any]:
    with urlopen(url, timeout=30) as answer:
        value: dict[str, Any] = json.load(answer)
    return value


def new_client(timeout_s: float) -> httpx.AsyncClient:
    """Return an HTTP client for servers on this machine. The client uses no proxy and checks no certificates."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False, verify=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """Run `expertmesh up` with `options` on free ports during the block. The block starts when the server is ready.

    Raises RuntimeError with the end of the server's output if the server is not ready within 300 s.
    """
    port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "services.cli", "up", "--port", str(port), "--grpc-port", str(grpc_port), *options]
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # SIGTERM raises SystemExit, so that the server is stopped
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        started = Server(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", process.pid)
        try:
            if not _is_ready(started.url, process):
                output.seek(0)
                output_tail = output.read()[-2000:].decode(errors="replace")
                raise RuntimeError(
                    f"`{' '.join(command[2:])}` ended or was not ready within {READY_TIMEOUT_S} s: {output_tail}"
                )
            yield started
        finally:
            _stop(process)


def _is_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            fetch_json(f"{url}/health/ready")
            return True
        except OSError:  # the server refuses connections or returns 503 until the backbone is ready
            time.sleep(0.3)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *below]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise RuntimeError(f"the server did not stop within {STOP_TIMEOUT_S} s and was killed") from None


# Linux's /proc --------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes that `pid` started, directly or through other processes."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process ended while its files were read
            continue
        children.setdefault(int(after_name[1]), []).append(int(path.parent.name))
    found, open_ = [], [pid]
    while open_:
        below = children.get(open_.pop(), [])
        found += below
        open_ += below
    return found


def command_of(pid: int) -> str:
    """Return the name that Ray gives to a worker (`ray::ServeReplica:…`); for other processes, the program's name."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    first = words[0].decode(errors="replace").split()
    if not first:
        return ""
    name = first[0].rpartition("/")[2]
    return f"{name} {words[1].decode(errors='replace').rpartition('/')[2]}" if name.startswith("python") else name


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory in bytes without shared pages of files; 0 if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES


def cpu_seconds(pid: int) -> float:
    """Return the CPU time in seconds that a process has used; 0 if the process has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
