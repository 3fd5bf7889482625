"""The benchmark measures how node failures, drains and upgrades of a cluster affect running requests (needs root).

    python -m benchmarks.day_two --trials 10

The benchmark deploys `serveConfigV2` of `k8s/overlays/gpu-ha` with `serve deploy` on a Ray cluster of nine nodes. Each
node has its own network namespace and address:

- a head whose state is in a Redis;
- three nodes for backbones, gateways and controllers, one more than needed;
- five nodes for expert shards, one more than needed.

The model is the demo model. Ray counts one GPU per node, but no GPU exists. The benchmark sends the same requests again
and again: first in a run without failures, and then in every trial. In a trial, one failure or upgrade happens at a
random moment. Clients connect through a balancer that sends connections only to gateways that are ready, as a
Kubernetes Service does. A stream breaks when its gateway stops. Therefore, when a trial loses a backbone's node, the
clients use the gateway of another node.

The table has the columns of `benchmarks.failures`, except for the time until full cover. The table has another time
instead: the total time in which some expert had fewer than two live homes, or in which no gateway reported cover.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import yaml

from benchmarks.failures import (
    AT_S,
    LOAD_SHARE,
    FailureTrial,
    make_load,
    measure_rate,
    print_header,
    read_coverage,
    table_row,
)
from benchmarks.local_cluster import (
    DASHBOARD_PORT,
    PASSWORD,
    ROOT,
    ClusterNode,
    LocalCluster,
    NamespaceNetwork,
    reason_unavailable,
)
from benchmarks.server import new_client
from services.cli.drill.drill import Disturbance, Load, under_load
from services.cli.drill.load import RequestOutcome

OVERLAY = ROOT / "k8s" / "overlays" / "gpu-ha" / "serve.yaml"
STORE_PORT, GCS_STORE_PORT = 6390, 6391
FIRSTS = (2, 30)  # last octet of the head's address in the first cluster, and in the cluster that replaces the first
DRAIN_S, GRACE_S = 120, 150  # maximum seconds for the drain of a node, and for the end of a pod, as in k8s/base
SWITCH_S = 10.0  # seconds in which both the old and the new cluster serve; less than rayClusterDeletionDelaySeconds
BACKBONE, EXPERTS = "backbone", "experts"
NUM_NODES = {BACKBONE: 3, "experts-gpu": 5}
NODE_CPUS = {BACKBONE: 2}  # CPUs per node; a node for experts has 1 CPU, which suffices for one shard
TIMEOUT_S, HEAD_AWAY_S = 400.0, 5.0

# A `ClusterAction` causes a failure or an upgrade. It returns the ids of the replicas that must disappear.
ClusterAction = Callable[["ServedCluster"], Coroutine[Any, Any, frozenset[str]]]


def gpu_ha_config() -> dict[str, Any]:
    """Return the Serve config of `OVERLAY`, changed for the demo model on CPUs; Ray counts GPUs that do not exist."""
    overlay = yaml.safe_load(OVERLAY.read_text())
    config: dict[str, Any] = yaml.safe_load(overlay["spec"]["serveConfigV2"])
    args = config["applications"][0]["args"]
    del args["model"], args["state_memory"]
    args |= {"device": "cpu", "backbone_gpus": 1, "backbone_threads": 1}
    for pool in args["pools"]:
        del pool["memory_budget"], pool["host_budget"]
        # The pool must not grow, because there are no nodes for more shards.
        pool |= {"device": "cpu", "num_gpus": 1, "num_cpus": 1, "max_shards": pool["shards"]}
    return config


@dataclass(frozen=True)
class ServeStatus:
    """A `ServeStatus` is the state of the application that Ray Serve reports."""

    is_settled: bool  # True if the application runs and all its replicas run
    replicas: dict[str, tuple[str, str]]  # replica id -> deployment and node address

    def addresses(self, deployment: str) -> set[str]:
        return {address for name, address in self.replicas.values() if name == deployment}


@dataclass
class ServedCluster:
    """A `ServedCluster` runs the application on a Ray cluster. The nodes form groups, like KubeRay's worker groups."""

    network: NamespaceNetwork
    config: dict[str, Any]
    num_nodes: Mapping[str, int]
    num_gpus: int  # GPUs per node
    random: random.Random
    store: str
    gcs_store: str
    clusters: list[LocalCluster] = field(default_factory=list)  # running clusters; the last cluster is the newest
    service: str = ""
    protected_gateway: str = ""  # address of the gateway that a trial must not stop; empty if a trial may stop any
    lost_nodes: list[ClusterNode] = field(default_factory=list)

    @property
    def args(self) -> dict[str, Any]:
        args: dict[str, Any] = self.config["applications"][0]["args"]
        return args

    @property
    def pool(self) -> dict[str, Any]:
        pool: dict[str, Any] = self.args["pools"][0]
        return pool

    @property
    def url(self) -> str:
        return f"http://{self.protected_gateway}:{self.args['http_port']}" if self.protected_gateway else self.service

    @property
    def cluster(self) -> LocalCluster:
        return self.clusters[-1]

    def start(self) -> None:
        backbones = range(1, 1 + self.num_nodes[BACKBONE])  # backbones have the addresses after the head
        self.service = self.network.balance([first + i for first in FIRSTS for i in backbones], self.args["http_port"])
        self.start_cluster()

    def start_cluster(self) -> None:
        """Start a new cluster with the same store and deploy the application on the new cluster.

        If a cluster already runs, it continues to run. The method returns as soon as Serve has accepted the config; the
        application may start later.
        """
        first = next(first for first in FIRSTS if first not in {cluster.first for cluster in self.clusters})
        env = {"EXPERTMESH_REDIS_URL": f"redis://{self.store}/0", "EXPERTMESH_REDIS_PASSWORD": PASSWORD}
        env |= {"OMP_NUM_THREADS": "1", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}
        self.clusters.append(LocalCluster(self.network, env, self.gcs_store, first))
        self.cluster.add_node(f"head-{first}", 0, {})
        self.cluster.wait_for_dashboard()
        for group, number in self.num_nodes.items():
            for i in range(first, first + number):
                self._add_node(f"{group}-{i}")
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(self.config, file)
            file.flush()
            self.cluster.serve("deploy", file.name)

    def _add_node(self, name: str) -> None:
        group = name.rpartition("-")[0]
        self.cluster.add_node(name, NODE_CPUS.get(group, 1), {"expertmesh.io/group": group}, self.num_gpus)

    @property
    def applications_url(self) -> str:
        return f"http://{self.cluster.head.address}:{DASHBOARD_PORT}/api/serve/applications/"

    async def read_status(self) -> ServeStatus:
        """Return Serve's status. If the head does not answer, the status has no replicas and `is_settled` is False."""
        try:
            async with new_client(5.0) as client:
                application = (await client.get(self.applications_url)).json()["applications"]["expertmesh"]
        except (httpx.HTTPError, LookupError, ValueError):
            return ServeStatus(is_settled=False, replicas={})
        deployments = application["deployments"].items()
        replicas = [(name, each) for name, deployment in deployments for each in deployment["replicas"]]
        are_all_up = all(each["state"] == "RUNNING" for _, each in replicas)
        are_healthy = all(deployment["status"] == "HEALTHY" for _, deployment in deployments)
        return ServeStatus(
            application["status"] == "RUNNING" and are_healthy and are_all_up,
            {each["replica_id"]: (name, each["node_ip"]) for name, each in replicas if each.get("node_ip")},
        )

    async def is_complete(self, without: frozenset[str] = frozenset()) -> bool:
        """Return True if all replicas run, every expert has two live homes, and no replica in `without` exists."""
        status = await self.read_status()
        is_covered, shards = await read_coverage(self.url)
        num_shards = sum(name == self.pool["name"] for name, _ in status.replicas.values())
        are_enough = len(shards) == num_shards >= self.pool["shards"]
        return status.is_settled and is_covered and are_enough and not without & status.replicas.keys()

    async def wait_until_complete(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not await self.is_complete():
            assert time.monotonic() < deadline, (
                f"the application did not recover in time: {await self.read_status()}\n{self.cluster.output_tail()}"
            )
            await asyncio.sleep(0.5)

    async def choose_node(self, deployment: str) -> tuple[ClusterNode, frozenset[str]]:
        """Choose a random node that runs `deployment`; return the node and the ids of its replicas.

        The function never chooses the node of the protected gateway.
        """
        status = await self.read_status()
        chosen = self.random.choice(sorted(status.addresses(deployment) - {self.protected_gateway}))
        node = next(node for node in self.cluster.nodes if node.address == chosen)
        return node, frozenset(id for id, (_, address) in status.replicas.items() if address == node.address)

    async def protect_gateway(self) -> None:
        self.protected_gateway = self.random.choice(sorted((await self.read_status()).addresses("gateway")))

    def stop(self) -> None:
        with ExitStack() as stack:
            for cluster in self.clusters:
                stack.callback(cluster.stop)

    def replace_lost_nodes(self) -> None:
        """Start a new node for every lost node, as Kubernetes would start a new pod."""
        for node in self.lost_nodes:
            self.cluster.remove_node(node)
            self._add_node(node.name)
        self.lost_nodes, self.protected_gateway = [], ""


@contextmanager
def served_cluster(
    config: dict[str, Any], num_nodes: Mapping[str, int], num_gpus: int, seed: int = 0, *, keeps_state: bool = False
) -> Iterator[ServedCluster]:
    with NamespaceNetwork() as network:
        gcs_store = network.start_redis(GCS_STORE_PORT) if keeps_state else ""
        store = network.start_redis(STORE_PORT)
        fleet = ServedCluster(network, config, num_nodes, num_gpus, random.Random(seed), store, gcs_store)
        try:
            fleet.start()
            yield fleet
        finally:
            fleet.stop()


async def lose_node(fleet: ServedCluster, role: str, how: Callable[[ClusterNode], None]) -> frozenset[str]:
    """Call `how` with a random node that runs a backbone or a shard (`role`); return the ids of the node's replicas."""
    node, replicas = await fleet.choose_node(fleet.pool["name"] if role == EXPERTS else role)
    fleet.lost_nodes.append(node)
    await asyncio.to_thread(how, node)
    return replicas


def kill_raylet(node: ClusterNode) -> None:
    os.kill(node.pid_of("raylet"), signal.SIGKILL)


async def lose_head(fleet: ServedCluster) -> frozenset[str]:
    await asyncio.to_thread(fleet.cluster.head.stop)
    await asyncio.sleep(HEAD_AWAY_S)
    await asyncio.to_thread(fleet.cluster.restart_head)
    return frozenset()


async def upgrade(fleet: ServedCluster) -> frozenset[str]:
    """Deploy changed arguments, as KubeRay does after a change of serveConfigV2; return the ids of the old replicas."""
    replicas = frozenset((await fleet.read_status()).replicas)
    fleet.args["max_waiting"] = fleet.args.get("max_waiting", 256) + 1
    async with new_client(30.0) as client:
        (await client.put(fleet.applications_url, json=fleet.config)).raise_for_status()
    return replicas


async def replace_cluster(fleet: ServedCluster) -> frozenset[str]:
    """Replace the cluster, as KubeRay does after a change of a pod template; return the ids of the old replicas.

    The function drains and stops the old cluster after the new cluster serves.
    """
    replicas = frozenset((await fleet.read_status()).replicas)
    old = fleet.cluster
    await asyncio.to_thread(fleet.start_cluster)
    async with asyncio.timeout(TIMEOUT_S):
        while not (await fleet.read_status()).is_settled:
            await asyncio.sleep(1.0)
    await asyncio.sleep(SWITCH_S)
    for node in old.nodes:
        node.drain()
    deadline = time.monotonic() + GRACE_S
    while any(node.process.poll() is None for node in old.nodes) and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    await asyncio.to_thread(old.stop)
    fleet.clusters.remove(old)
    return replicas


@dataclass(frozen=True)
class ClusterFailure:
    name: str
    action: ClusterAction
    seconds: float = 34.0  # duration of the load in one trial
    protects_gateway: bool = False


def losing(role: str, how: Callable[[ClusterNode], None]) -> ClusterAction:
    return functools.partial(lose_node, role=role, how=how)


CLUSTER_FAILURES = (
    ClusterFailure("kill -9 of the raylet of an expert node", losing(EXPERTS, kill_raylet)),
    ClusterFailure("an expert node cut off from the network", losing(EXPERTS, ClusterNode.cut_off)),
    ClusterFailure("an expert node drained", losing(EXPERTS, ClusterNode.drain)),
    ClusterFailure(
        "kill -9 of the raylet of another backbone's node", losing(BACKBONE, kill_raylet), protects_gateway=True
    ),
    ClusterFailure(
        "another backbone's node cut off from the network", losing(BACKBONE, ClusterNode.cut_off), protects_gateway=True
    ),
    ClusterFailure("a backbone's node drained", losing(BACKBONE, ClusterNode.drain), 60.0),
    ClusterFailure("kill -9 of all of the head, which comes back", lose_head),
    ClusterFailure("serveConfigV2 with other arguments", upgrade, 150.0),
    ClusterFailure("another cluster takes over", replace_cluster, 300.0),
)


async def run_trial(
    fleet: ServedCluster, kind: ClusterFailure, load: Load, undisturbed: list[RequestOutcome]
) -> FailureTrial:
    await fleet.wait_until_complete()
    if kind.protects_gateway:
        await fleet.protect_gateway()
    begun: list[asyncio.Task[frozenset[str]]] = []
    uncovered_s, looked_at = 0.0, 0.0

    async def start_action() -> None:
        nonlocal looked_at
        looked_at = time.monotonic()
        begun.append(asyncio.create_task(kind.action(fleet)))

    async def is_complete() -> bool:
        nonlocal uncovered_s, looked_at
        is_covered, _ = await read_coverage(fleet.url)
        before, looked_at = looked_at, time.monotonic()
        uncovered_s += 0.0 if is_covered else looked_at - before
        return begun[0].done() and await fleet.is_complete(without=begun[0].result())

    load = replace(load, url=f"{fleet.url}/v1/completions")
    disturbance = Disturbance(start_action, is_complete, fleet.random.uniform(*AT_S), TIMEOUT_S)
    try:
        verdict, recovered_s = await under_load(load, disturbance, undisturbed, window_s=kind.seconds)
    finally:
        await asyncio.gather(*begun)
    return FailureTrial(verdict, uncovered_s, recovered_s)


async def run(fleet: ServedCluster, kinds: list[ClusterFailure], num_trials: int) -> None:
    await fleet.wait_until_complete()
    warm_up = make_load(fleet.service, 2.0, 12.0)
    rate = LOAD_SHARE * await measure_rate(fleet.service, list(warm_up.bodies[:24]))
    print_header(rate, "without full cover, s")
    for kind in kinds:
        load = make_load(fleet.service, rate, kind.seconds)
        await fleet.wait_until_complete()
        undisturbed, trials = await load.run(), []
        for _ in range(num_trials):
            trials.append(await run_trial(fleet, kind, load, undisturbed))
            await asyncio.to_thread(fleet.replace_lost_nodes)
            if errors := trials[-1].verdict.errors:
                print(f"  {kind.name}: {errors}", flush=True)
        print(table_row(kind.name, trials), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="trials of each kind of failure")
    parser.add_argument("--kinds", default="", help="run only the kinds of failure whose names contain this text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = [kind for kind in CLUSTER_FAILURES if args.kinds in kind.name]
    if not kinds:
        parser.error(f"--kinds {args.kinds!r} matches none of: {', '.join(kind.name for kind in CLUSTER_FAILURES)}")
    if reason := reason_unavailable():
        parser.error(f"this machine cannot run a cluster of several nodes: {reason}")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # SIGTERM raises SystemExit, so that the cluster is stopped
    with served_cluster(gpu_ha_config(), NUM_NODES, 1, args.seed, keeps_state=True) as fleet:
        asyncio.run(run(fleet, kinds, args.trials))


if __name__ == "__main__":
    main()
