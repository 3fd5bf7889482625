"""What the cpu-demo overlay deploys, on a cluster of six nodes of this machine; then one of them is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from services.drill.drill import Disturbance, Load, under_load
from tests.k8s.local_cluster import LocalCluster, Node, why_not
from tests.k8s.manifests import Manifests, app_args, ray_service, worker_group

IS_WANTED = "EXPERTMESH_CLUSTER_TEST" in os.environ  # two minutes
WHY_NOT = why_not() if IS_WANTED else "set EXPERTMESH_CLUSTER_TEST to run it"
PASSWORD = "of-this-test"
NUM_EXPERT_NODES, CPUS_OF_NODE = 4, 2
READY_TIMEOUT_S = 240.0
RATE, SECONDS, MAX_TOKENS, AT_S = 1.5, 16.0, 24, 3.0
MAX_GAP_S = 1.0


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.timeout(600)
def test_requests_do_not_notice_the_loss_of_a_node(rendered: Callable[[str], Manifests], tmp_path: Path) -> None:
    manifests = rendered("cpu-demo")
    config = tmp_path / "serve.yaml"
    config.write_text(ray_service(manifests)["spec"]["serveConfigV2"])
    with LocalCluster({"EXPERTMESH_REDIS_PASSWORD": PASSWORD, "OMP_NUM_THREADS": "1"}) as cluster:
        cluster.env |= {"EXPERTMESH_REDIS_URL": cluster.start_redis(PASSWORD)}
        cluster.add_node("head", 0, {"expertmesh.io/group": "head"})
        cluster.wait_for_dashboard()
        backbone = cluster.add_node("backbone", 4, worker_group(manifests, "backbone")["labels"])
        experts = [
            cluster.add_node(f"experts-{i}", CPUS_OF_NODE, worker_group(manifests, "experts-cpu")["labels"])
            for i in range(NUM_EXPERT_NODES)
        ]
        url = f"http://{backbone.address}:{app_args(manifests)['http_port']}"
        cluster.serve("deploy", str(config))
        wait_until_ready(url, cluster)
        assert answer(url)
        assert asyncio.run(lose_one(url, experts)) == []


def wait_until_ready(url: str, cluster: LocalCluster) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"{url}/health/ready", timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, f"{cluster.serve('status')}\n{cluster.said()}"
        time.sleep(1.0)


def answer(url: str) -> str:
    """What OpenAI's own client is told."""
    with httpx.Client(trust_env=False) as http:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)
        messages: Any = [{"role": "user", "content": "Hello"}]
        said = client.chat.completions.create(model="demo", messages=messages, max_tokens=8)
    return said.choices[0].message.content or ""


async def lose_one(url: str, experts: list[Node]) -> list[str]:
    """Kills the raylet of a node that has shards, under load; what is wrong with what came of it."""
    async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
        status = (await client.get("/status")).json()
        shards = {shard["id"]: shard["node"] for shard in status["shards"]}
        node = random.Random(0).choice([node for node in experts if node.name in shards.values()])
        lost = {id for id, name in shards.items() if name == node.name}

        async def kill() -> None:
            os.kill(node.pid_of("raylet"), signal.SIGKILL)

        async def is_whole() -> bool:
            report = (await client.get("/health/degraded")).json()
            return report["status"] == "covered" and not lost & report["blast_radius"].keys()

        load = Load.of_sentences(url, RATE, SECONDS, MAX_TOKENS)
        verdict, whole_s = await under_load(load, Disturbance(kill, is_whole, AT_S))
    found = {
        f"{verdict.num_failed} of {verdict.num_requests} failed: {verdict.errors}": verdict.num_failed == 0,
        f"{verdict.num_different} of {verdict.num_requests} were answered with other tokens": verdict.num_different
        == 0,
        f"the longest gap between two tokens was {verdict.longest_gap_s:.2f} s": verdict.longest_gap_s < MAX_GAP_S,
        "full cover did not come back in time": whole_s is not None,
        "two homes of an expert were on one node": len(set(shards.values())) >= 2,
    }
    return [sentence for sentence, is_good in found.items() if not is_good]
