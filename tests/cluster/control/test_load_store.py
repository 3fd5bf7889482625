from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cluster.control.load_store import LoadStore
from cluster.control.registry import connect
from cluster.control.registry_store import StoreUnavailable
from tests.cluster.recent_windows import recent_windows

NOW = 1_800_000_000.0


def test_load_adds_up_in_redis(redis_url: str) -> None:
    asyncio.run(_load_adds_up(redis_url))


async def _load_adds_up(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        store = LoadStore(redis, "load-test", window_s=10, keep_s=100)
        await store.add({}, NOW)
        await store.add({3: np.array([1, 0, 5]), 4: np.array([2, 2, 2])}, NOW)
        await store.add({3: np.array([1, 1, 0])}, NOW)
        await store.add({3: np.array([0, 0, 9])}, NOW - 10)
        windows = recent_windows(store, NOW)
        assert len(windows) == 10
        counts_WE = await store.read(3, 3, windows)
        assert counts_WE[-2:].tolist() == [[0, 0, 9], [2, 1, 5]]
        assert not counts_WE[:-2].any()
        assert 100 < await redis.ttl(f"{store.prefix}load:3:{store.window(NOW)}") <= 110


def test_a_dead_redis_is_said_quickly() -> None:
    async def add_load() -> None:
        async with connect("redis://127.0.0.1:1/0") as redis:
            await LoadStore(redis, "m").add({0: np.array([1])}, NOW)

    with pytest.raises(StoreUnavailable, match="Redis did not do what it was asked"):
        asyncio.run(add_load())
