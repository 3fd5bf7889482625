"""These tests order a pool of a real application to grow and shrink under load. No client may notice the change.

The order of the tests matters: each test continues with the pool as the previous test has left it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import httpx
import pytest

from cluster.control.operator_orders import OrderKind, StandingOrder
from cluster.control.registry import Registry, connect
from cluster.control.registry_store import StoreUnavailable
from tests.services.application import Application, wait_until
from tests.services.demo import held_out_prompts

pytestmark = pytest.mark.serial

POOL = "experts-cpu"
NUM_CLIENTS, MAX_TOKENS = 3, 24
# Usually 1 s. A controller that does not notice the new shard uses the shard with the next plan for a changed load, and
# these plans are `plan_every_s` = 10 s apart.
USEFUL_WITHIN_S = 8.0
CHANGE_TIMEOUT_S = 60.0


@dataclass
class Watch:
    """A `Watch` polls the store. It records when each shard registers and joins the placement, and the lowest cover."""

    url: str
    seen_at: dict[str, float] = field(default_factory=dict)
    placed_at: dict[str, float] = field(default_factory=dict)
    lowest_cover: int = 1000
    live: set[str] = field(default_factory=set)
    draining: set[str] = field(default_factory=set)
    placed: set[str] = field(default_factory=set)

    def __enter__(self) -> Self:
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    async def _run(self) -> None:
        redis = connect(self.url)
        registry = Registry(redis, "demo")
        while not self._is_over.is_set():
            with suppress(StoreUnavailable):  # on a busy machine, the store's reply may come after the timeout
                await self._look(registry)
            await asyncio.sleep(0.1)
        await redis.aclose()

    async def _look(self, registry: Registry) -> None:
        placement, shards, now = await registry.placement(), await registry.shards(), time.monotonic()
        self.live = {shard.id for shard in shards}
        self.draining = {shard.id for shard in shards if shard.draining}
        for id in self.live:
            self.seen_at.setdefault(id, now)
        if placement is not None:
            self.placed = set(placement.shard_ids)
            for id in self.placed:
                self.placed_at.setdefault(id, now)
            self.lowest_cover = min(self.lowest_cover, placement.cover(self.live))

    def is_at(self, num_shards: int) -> bool:
        return len(self.live) == num_shards and not self.draining and self.placed == self.live


class Clients:
    """`Clients` repeat the same requests. They compare each answer with the answer before any change of the pool."""

    def __init__(self, server: Application) -> None:
        self.server, self.num_done, self.wrong = server, 0, list[str]()
        self.prompts = held_out_prompts(NUM_CLIENTS)
        self.expected = [self.ask(prompt) for prompt in self.prompts]
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(NUM_CLIENTS)]

    def ask(self, prompt: list[int]) -> str:
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        response = self.server.post("/v1/completions", json=body)
        return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else response.text

    def _run(self, number: int) -> None:
        while not self._is_over.is_set():
            try:
                text = self.ask(self.prompts[number])
            except httpx.HTTPError as error:
                text = repr(error)
            self.num_done += 1
            if text != self.expected[number]:
                self.wrong.append(text)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Application]:
    with Application(3, "--max-shards", "4") as application:
        application.wait_until_ready()
        yield application


async def order(server: Application, num_shards: int) -> None:
    redis = connect(server.redis[1])
    await Registry(redis, "demo").give_order(StandingOrder(OrderKind.SCALE, POOL, num_shards, "a test", time.time()))
    await redis.aclose()


def change(server: Application, num_shards: int) -> Watch:
    """Scale the pool to `num_shards` under load. Assert that all answers stay right and that the cover stays full."""
    with Clients(server) as clients, Watch(server.redis[1]) as watch:
        asyncio.run(order(server, num_shards))
        ordered_at = time.monotonic()
        assert wait_until(lambda: watch.is_at(num_shards), CHANGE_TIMEOUT_S), server.status()
        print(f"{num_shards} shards {time.monotonic() - ordered_at:.1f} s after the order")
        before = clients.num_done
        assert wait_until(lambda: clients.num_done >= before + 2 * NUM_CLIENTS, 60)
    assert not clients.wrong
    assert watch.lowest_cover >= 2
    return watch


def test_a_shard_more_is_useful_at_once(server: Application) -> None:
    watch = change(server, 4)
    new = max(watch.seen_at, key=lambda id: watch.seen_at[id])
    took_s = watch.placed_at[new] - watch.seen_at[new]
    print(f"placed {took_s:.2f} s after its first heartbeat")
    assert took_s < USEFUL_WITHIN_S

    def is_live() -> bool:
        return any(shard["id"] == new and shard["state"] == "live" for shard in server.status()["shards"])

    assert wait_until(is_live, 60)  # the status follows the placement within a second or two


def test_a_shard_less_has_given_up_its_experts_before(server: Application) -> None:
    change(server, 3)


def test_no_more_shards_than_the_pool_may_have(server: Application) -> None:
    asyncio.run(order(server, 9))
    with Watch(server.redis[1]) as watch:
        assert wait_until(lambda: watch.is_at(4), CHANGE_TIMEOUT_S)
        time.sleep(3.0)
        assert watch.is_at(4)
