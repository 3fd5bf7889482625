"""The tests check the admin API over HTTP, with a real Redis and a plan from the real planner."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest

from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.load_store import LoadStore
from cluster.control.registry import Registry, connect
from cluster.placement.planner import plan
from cluster.topology import LayerSpec, Placement, Shard
from services.gateway.generation import Generation
from services.gateway.health import Health
from services.gateway.operator.admin import add_admin
from services.gateway.operator.operations import ExpertTier, Operations
from services.gateway.rest import build_rest
from tests.services.gateway.echo import plain_http, serving

KEY = "the key of this test"
LAYERS = [LayerSpec(0, 3, 1 << 20, 1), LayerSpec(4, 2, 1 << 20, 1)]
SHARDS = [Shard(id, f"127.0.0.1:{port}", "n", "experts-cpu", "cpu", "i", 1 << 30) for port, id in enumerate("abc", 1)]
PLACEMENT = Placement(3, {0: (("a", "b"), ("b",), ("a", "b")), 4: (("a", "b"), ("a", "b"))}, {0: 1, 4: 1})


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


@cache
def planned() -> dict[str, Any]:
    """Return a plan from the real planner.

    Tests call `planned` before they start a server, because compiling the planner may take long.
    """
    return plan(LAYERS, SHARDS, PLACEMENT, {}).to_dict()


class Fleet:
    """A `Fleet` gives a test access to the state in Redis that the server reads.

    Every method that a test calls opens a new connection to Redis on a new event loop.
    """

    def __init__(self, redis_url: str) -> None:
        self.redis_url, self.model = redis_url, uuid.uuid4().hex
        self.traces: list[dict[str, Any] | None] = []

    def registry(self) -> Registry:
        return Registry(connect(self.redis_url), self.model, ttl_s=60)

    def fill(self) -> None:
        """Write the shards, a placement, a decision and the load of some experts to Redis."""

        async def run() -> None:
            registry, loads = self.registry(), LoadStore(connect(self.redis_url), self.model)
            for shard in SHARDS:
                await registry.heartbeat(shard)
            await registry.publish(PLACEMENT, 0, 0)
            await registry.note_decision({"kind": "plan", "why": "A test."})
            await loads.add({0: np.array([30, 60, 0]), 4: np.array([0, 10])}, time.time())
            await registry.redis.aclose()
            await loads.redis.aclose()

        asyncio.run(run())

    def orders(self) -> dict[str, Any]:
        async def run() -> dict[str, Any]:
            registry = self.registry()
            orders = await registry.orders()
            await registry.redis.aclose()
            return orders

        return asyncio.run(run())

    async def preview(self) -> dict[str, Any] | None:
        return planned()

    async def trace(self, bounds: dict[str, Any] | None) -> list[dict[str, Any]]:
        self.traces.append(bounds)
        return [{"endpoint": "x:1", "is_recording": bounds is not None}]


@pytest.fixture
def fleet(redis_url: str) -> Fleet:
    planned()
    made = Fleet(redis_url)
    made.fill()
    return made


def serve(generation: Generation, key: str | None, fleet: Fleet | None) -> Any:
    """Return a context manager that serves the admin API and yields the server's URL.

    `key` is the admin key. If `fleet` is None, the experts are local.
    """

    async def health() -> Health:
        return Health(is_ready=True)

    app = build_rest(generation, health)
    if fleet is None:
        add_admin(app, key, None)
        return serving(app)
    registry, loads = fleet.registry(), LoadStore(connect(fleet.redis_url), fleet.model)
    tier = ExpertTier(LAYERS, {"experts-cpu": (1, 5), "experts-gpu": (2, 2)}, fleet.preview, fleet.trace)
    add_admin(app, key, Operations(tier, registry, loads))

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        yield
        await registry.redis.aclose()
        await loads.redis.aclose()

    app.router.lifespan_context = lifespan
    return serving(app, "on")


@pytest.fixture
def http(fleet: Fleet, generation: Generation) -> Iterator[httpx.Client]:
    with (
        serve(generation, KEY, fleet) as url,
        plain_http(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client,
    ):
        yield client


def sentence(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


ROUTES = [
    *(("GET", path) for path in ("plan", "load", "load?top=3", "decisions", "placement")),
    *(("POST", path) for path in ("rebalance", "pools/experts-cpu/scale", "shards/a/drain", "traces")),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY])
def test_nothing_is_told_without_the_key(http: httpx.Client, fleet: Fleet, method: str, path: str, header: str) -> None:
    answer = http.request(method, f"/admin/{path}", headers={"Authorization": header})
    assert sentence(answer, 401).startswith("The admin API needs the header ")
    assert fleet.orders() == {}


def test_without_a_key_of_the_server_it_is_closed(generation: Generation) -> None:
    with serve(generation, None, None) as url:
        for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Bearer None"}):
            answer = httpx.get(f"{url}/admin/plan", headers=header)
            assert "set EXPERTMESH_ADMIN_KEY" in sentence(answer, 403)


def test_local_experts_leave_nothing_to_administer(generation: Generation) -> None:
    with serve(generation, KEY, None) as url:
        answer = httpx.get(f"{url}/admin/plan", headers={"Authorization": f"Bearer {KEY}"})
        assert sentence(answer, 404) == "The experts are in the backbone: there are no shards to administer."


def test_a_shard_is_drained_and_used_again(http: httpx.Client, fleet: Fleet) -> None:
    for by in ("ada", "bob"):  # an operator may give an order again
        order = http.post("/admin/shards/a/drain", json={"by": by}).raise_for_status().json()["order"]
    assert (order["kind"], order["subject"], order["by"]) == ("drain", "a", "bob")
    assert abs(order["at"] - time.time()) < 10
    assert [*fleet.orders()] == ["drain:a"]
    for expected in (True, False):
        assert http.post("/admin/shards/a/drain", json={"undo": True}).json() == {"lifted": expected}
    assert fleet.orders() == {}


def test_the_last_shard_is_not_drained(http: httpx.Client, fleet: Fleet) -> None:
    for id in "ab":
        http.post(f"/admin/shards/{id}/drain").raise_for_status()
    answer = http.post("/admin/shards/c/drain")
    assert sentence(answer, 400).startswith("c is the last shard that is not draining, ")
    assert sentence(http.post("/admin/shards/z/drain"), 404) == "There is no shard 'z'; there are a, b, c."
    assert [*fleet.orders()] == ["drain:a", "drain:b"]
    assert fleet.orders()["drain:a"].by == "127.0.0.1"


def test_a_pool_is_scaled_and_left_to_its_load_again(http: httpx.Client, fleet: Fleet) -> None:
    assert http.post("/admin/pools/experts-cpu/scale", json={"shards": 5}).json()["order"]["count"] == 5
    assert fleet.orders()["scale:experts-cpu"].count == 5
    assert http.post("/admin/pools/experts-cpu/scale", json={"shards": None}).json() == {"lifted": True}
    assert fleet.orders() == {}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("pools/experts-tpu/scale", '{"shards": 2}', 404, "There is no pool 'experts-tpu'; there are experts-cpu, "),
        ("pools/experts-cpu/scale", "{}", 400, "shards is missing, but required."),
        ("pools/experts-cpu/scale", '{"shards": 0}', 400, "shards must be greater than or equal to 1, not 0."),
        ("pools/experts-cpu/scale", '{"shards": "many"}', 400, "shards must be "),
        ("pools/experts-cpu/scale", '{"shards": 6}', 400, "shards of experts-cpu must be from 1 to 5, not 6; "),
        ("pools/experts-gpu/scale", '{"shards": 3}', 400, "shards of experts-gpu must be 2, the pool's fixed size, "),
        (
            "pools/experts-cpu/scale",
            '{"shards": 1, "shrads": 2}',
            400,
            "Unknown field 'shrads'; the nearest allowed field is 'shards'",
        ),
        ("rebalance", "{", 400, "The body is not valid JSON"),
        ("traces", '{"action": "pause"}', 400, "action must be "),
        ("traces", '{"action": "start", "max_seconds": 1e9}', 400, "max_seconds must be "),
    ],
)
def test_a_mistake_is_one_sentence(http: httpx.Client, path: str, body: str, status: int, words: str) -> None:
    assert sentence(http.post(f"/admin/{path}", content=body), status).startswith(words)


@pytest.mark.parametrize("top", ["0", "-1", "x", "1001", "9" * 30, ""])
def test_a_number_out_of_bounds_is_one_sentence(http: httpx.Client, top: str) -> None:
    words = sentence(http.get("/admin/load", params={"top": top}), 400)
    assert words.startswith("top must be a whole number from 1 to 1000, not ")


def test_rebalance_is_an_order(http: httpx.Client, fleet: Fleet) -> None:
    http.post("/admin/rebalance").raise_for_status()
    assert http.post("/admin/rebalance", json={"by": "ada"}).json()["order"]["by"] == "ada"
    assert [*fleet.orders()] == ["rebalance:"]


def test_the_plan_is_told_in_numbers_and_in_words(http: httpx.Client) -> None:
    shown = http.get("/admin/plan").raise_for_status().json()
    assert (shown["cover_before"], shown["cover_after"]) == (1, 2)
    assert shown["blast_radius_before"]["b"] > 0 == shown["blast_radius_after"]["b"]
    assert {move["kind"] for move in shown["moves"]} >= {"add"}
    assert "Cover (fewest live homes of an expert): 1 now, 2 then." in shown["text"]


def test_the_load_is_a_matrix_or_the_hottest(http: httpx.Client) -> None:
    whole = http.get("/admin/load").raise_for_status().json()
    assert [len(rates) for rates in whole["layers"].values()] == [3, 2]
    assert sum(whole["layers"]["0"]) * whole["seconds"] == pytest.approx(90, rel=1e-2)
    hottest = http.get("/admin/load?top=2").raise_for_status().json()["experts"]
    assert [(one["layer"], one["expert"], one["homes"]) for one in hottest] == [(0, 1, ["b"]), (0, 0, ["a", "b"])]
    assert hottest[0]["share"] == pytest.approx(2 / 3)


def test_placement_and_decisions_are_told(http: httpx.Client) -> None:
    shown = http.get("/admin/placement").raise_for_status().json()
    assert shown["placement"]["homes"]["0"] == [["a", "b"], ["b"], ["a", "b"]]
    memory: dict[str, dict[str, int]] = {"device_bytes": {}, "host_bytes": {}}
    groups = {"num_groups": 1, "top_groups": 1}
    assert shown["layers"][1] == {"layer": 4, "num_experts": 2, "expert_bytes": 1 << 20, "top_k": 1, **memory, **groups}
    assert [shard["id"] for shard in shown["shards"]] == ["a", "b", "c"]
    assert http.get("/admin/decisions?count=1").json() == {"decisions": [{"kind": "plan", "why": "A test."}]}


def test_traces_begin_and_end_on_every_backbone(http: httpx.Client, fleet: Fleet) -> None:
    began = http.post("/admin/traces", json={"action": "start", "max_seconds": 5}).raise_for_status().json()
    assert began == {"backbones": [{"endpoint": "x:1", "is_recording": True}]}
    http.post("/admin/traces", json={"action": "stop"}).raise_for_status()
    assert fleet.traces == [{"max_bytes": 64 << 20, "max_seconds": 5.0}, None]


def test_a_store_that_is_gone_is_one_sentence(generation: Generation) -> None:
    with EmbeddedRedis() as gone:
        lost = Fleet(gone.url)
    with serve(generation, KEY, lost) as url:
        answer = httpx.post(f"{url}/admin/rebalance", headers={"Authorization": f"Bearer {KEY}"})
        assert sentence(answer, 503).startswith("The store does not answer: ")
        assert answer.headers["retry-after"] == "1"
