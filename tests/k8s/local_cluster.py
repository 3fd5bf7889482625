"""A Ray cluster of several nodes on this machine, each in a network namespace of its own, with an address as a pod has.

It needs root and iproute2. What is started here is stopped by its process id; the namespaces go with the cluster.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from benchmarks.server import command_of, descendants
from cluster.embedded import find_server

ROOT = Path(__file__).parents[2]
GCS_PORT, DASHBOARD_PORT, REDIS_PORT = 6379, 8265, 6390
START_TIMEOUT_S = 90.0


def why_not() -> str:
    """Why there can be no such cluster here; empty if there can."""
    if shutil.which("ip") is None:
        return "no `ip` (iproute2)"
    done = subprocess.run(["ip", "netns", "add", probe := f"em-{secrets.token_hex(2)}"], capture_output=True, text=True)
    if done.returncode:
        return f"no network namespaces: {done.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Node:
    """A machine of the cluster; `address` is reachable from here and from the other nodes."""

    name: str  # as shards are told that their node is called
    namespace: str
    address: str
    process: subprocess.Popen[bytes]

    def pid_of(self, program: str) -> int:
        found = [pid for pid in descendants(self.process.pid) if command_of(pid).split()[:1] == [program]]
        assert len(found) == 1, f"{len(found)} processes of {self.namespace} are called {program}"
        return found[0]

    def stop(self) -> None:
        """At once, with all that runs there: told to stop, each node would take twenty seconds."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True)
        for pid in map(int, listed.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class LocalCluster:
    """Nodes are added one by one, the head first; `env` is every node's."""

    env: dict[str, str]
    nodes: list[Node] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._name, self._net = (
            f"em{secrets.token_hex(2)}",
            f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}",
        )
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="em-")))
        _ip("link", "add", self._name, "type", "bridge")
        self._stack.callback(_ip, "link", "del", self._name)
        _ip("addr", "add", f"{self._net}.1/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def host(self) -> str:
        """This machine's address, as nodes see it."""
        return f"{self._net}.1"

    def start_redis(self, password: str) -> str:
        """The URL, without the password."""
        options = ["--bind", self.host, "--port", str(REDIS_PORT), "--requirepass", password, "--save", ""]
        process = subprocess.Popen([find_server(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return f"redis://{self.host}:{REDIS_PORT}/0"

    def add_node(self, name: str, num_cpus: int, labels: Mapping[str, str]) -> Node:
        number = len(self.nodes) + 2
        namespace, address = f"{self._name}-{number}", f"{self._net}.{number}"
        _ip("netns", "add", namespace)
        self._stack.callback(_ip, "netns", "del", namespace)
        _ip("link", "add", f"{self._name}v{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", f"{self._name}v{number}", "master", self._name, "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", namespace, "link", "set", device, "up")
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--node-ip-address", address, "--num-cpus", str(num_cpus)]
        command += ["--labels", ",".join(f"{key}={value}" for key, value in labels.items())]
        command += self._head_options() if not self.nodes else ["--address", f"{self.nodes[0].address}:{GCS_PORT}"]
        # On Kubernetes the operator brings a token; here nobody else reaches the addresses.
        ours = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        every = {**os.environ, **ours, **self.env}
        every["EXPERTMESH_NODE"] = name
        printed = self._folder / f"{name}.txt"
        with printed.open("wb") as output:
            process = subprocess.Popen(command, env=every, cwd=ROOT, stdout=output, stderr=output)
        node = Node(name, namespace, address, process)
        self._stack.callback(node.stop)
        self.nodes.append(node)
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"Ray runtime started" not in printed.read_bytes():  # one by one: together they take minutes on two cores
            has_failed = process.poll() is not None or time.monotonic() > deadline
            assert not has_failed, printed.read_text(errors="replace")[-2000:]
            time.sleep(0.2)
        return node

    def _head_options(self) -> list[str]:
        ports = ["--port", str(GCS_PORT), "--dashboard-port", str(DASHBOARD_PORT)]
        return ["--head", *ports, "--dashboard-host", "0.0.0.0", "--temp-dir", str(self._folder / "ray")]

    def serve(self, *words: str) -> str:
        """What `serve …` printed, asked of the head's dashboard. CalledProcessError where it failed."""
        command = [sys.executable, "-m", "ray.serve.scripts", *words]
        where = ["--address", f"http://{self.nodes[0].address}:{DASHBOARD_PORT}"]
        return subprocess.run([*command, *where], check=True, capture_output=True, text=True, cwd=ROOT).stdout

    def wait_for_dashboard(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.serve("status")
                return
            except subprocess.CalledProcessError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the head's dashboard does not answer: {error.stderr[-1000:]}") from None
                time.sleep(1.0)

    def said(self) -> str:
        """The end of what the nodes printed."""
        return "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(self._folder.glob("*.txt")))
