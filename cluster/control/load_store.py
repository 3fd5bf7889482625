"""The `LoadStore` keeps the expert load in Redis: backbones add counts every second, and the controller reads them.

Legend: E experts of a layer, W windows of time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from cluster.control.registry import key_prefix, store_errors
from cluster.load import Counts, ExpectedLoad, expected_load

WINDOW_S = 30  # Length of a window of time in seconds.
KEEP_S = 2 * 3600  # Seconds for which Redis keeps the counts of a window.

# A script adds all counts of a layer in one call. The script costs the sender 0.1 ms of CPU, while 512 HINCRBY commands
# cost 6 ms.
ADD = """
local counts = cjson.decode(ARGV[1])
for i = 1, #counts, 2 do redis.call('HINCRBY', KEYS[1], counts[i], counts[i + 1]) end
return redis.call('EXPIRE', KEYS[1], ARGV[2])
"""


class LoadStore:
    """A `LoadStore` counts picks per expert, layer and window in Redis; `add` and `read` may raise StoreUnavailable.

    - `window_s`: the length of a window in seconds.
    - `keep_s`: the seconds for which Redis keeps the counts of a window.
    """

    def __init__(self, redis: Redis, model: str, window_s: int = WINDOW_S, keep_s: int = KEEP_S) -> None:
        assert 0 < window_s <= keep_s
        self.redis = redis
        self.prefix = key_prefix(model)
        self.window_s = window_s
        self.keep_s = keep_s

    def window(self, now: float) -> int:
        """Return the index of the window that contains the time `now`, in seconds since 1970."""
        return int(now // self.window_s)

    async def add(self, taken: Mapping[int, Counts], now: float) -> None:
        """Add the counts in `taken` to the window that contains `now`, in one round trip.

        `taken` maps each layer to its counts, int64 [E], as `LoadCounter.take` returns them.
        """
        with store_errors():
            async with self.redis.pipeline(transaction=False) as pipe:
                for layer, counts_E in taken.items():
                    arguments = [_packed(counts_E), self.keep_s + self.window_s]
                    pipe.execute_command("EVAL", ADD, 1, self._key(layer, self.window(now)), *arguments)
                await pipe.execute()

    async def read(self, layer: int, num_experts: int, windows: Iterable[int]) -> Counts:
        """Return the counts of one layer in `windows` as int64 [W, E]; a window without picks is a row of zeros."""
        with store_errors():
            async with self.redis.pipeline(transaction=False) as pipe:
                for window in windows:
                    pipe.hgetall(self._key(layer, window))
                stored: list[Mapping[str, str]] = await pipe.execute()
        counts_WE = np.zeros((len(stored), num_experts), np.int64)
        for row_E, hash in zip(counts_WE, stored, strict=True):
            for expert, count in hash.items():
                row_E[int(expert)] = int(count)
        return counts_WE

    def _key(self, layer: int, window: int) -> str:
        return f"{self.prefix}load:{layer}:{window}"


def _packed(counts_E: Counts) -> str:
    experts = counts_E.nonzero()[0]
    return json.dumps(np.stack([experts, counts_E[experts]], axis=1).reshape(-1).tolist(), separators=(",", ":"))


async def recent_rates(
    store: LoadStore, num_experts: Mapping[int, int], now: float, num_windows: int = 4
) -> tuple[float, dict[int, NDArray[np.float64]]]:
    """Return a pair: the measured time in seconds, and the picks per second of each expert, by layer.

    The measured time ends at `now`. It contains the present window and at most `num_windows` earlier windows. Windows
    before the first window with picks are left out. Raises StoreUnavailable.
    """
    windows = range(store.window(now) - num_windows, store.window(now) + 1)
    counts = {layer: await store.read(layer, count, windows) for layer, count in num_experts.items()}
    is_used_W = np.any([counts_WE.any(axis=1) for counts_WE in counts.values()], axis=0)
    first = int(is_used_W.argmax()) if is_used_W.any() else len(windows) - 1
    seconds = max(1.0, now - windows[first] * store.window_s)
    return seconds, {layer: counts_WE[first:].sum(axis=0) / seconds for layer, counts_WE in counts.items()}


class LoadHistory:
    """A `LoadHistory` gives a controller the expected load; it reads each past window from the store only once.

    `num_windows` is the number of windows from which the load is computed, including the present window.
    """

    def __init__(self, store: LoadStore, num_experts: Mapping[int, int], num_windows: int = 40) -> None:
        self.store, self.num_experts, self.num_windows = store, dict(num_experts), num_windows
        self._known: dict[tuple[int, int], Counts] = {}  # The counts of past windows, by layer and window.

    async def expected(self, now: float) -> dict[int, ExpectedLoad]:
        """Return the expected load of every layer that has picks in the last `num_windows` windows.

        Raises StoreUnavailable.
        """
        present = self.store.window(now)
        windows = range(present - self.num_windows + 1, present + 1)
        first = windows[0]
        self._known = {key: counts for key, counts in self._known.items() if first <= key[1] < present - 1}
        loads = {}
        for layer, num_experts in self.num_experts.items():
            missing = [window for window in windows if (layer, window) not in self._known]
            counts_WE = await self.store.read(layer, num_experts, missing)
            self._known |= {(layer, window): row for window, row in zip(missing, counts_WE, strict=True)}
            counts_WE = np.stack([self._known[layer, window] for window in windows])
            is_used = counts_WE.any(axis=1)
            # Windows before the first window with picks do not count, because there was no fleet yet.
            if is_used.any():
                start = int(is_used.argmax())
                ages_s = [(present - window) * float(self.store.window_s) for window in windows[start:]]
                loads[layer] = expected_load(counts_WE[start:], ages_s, self.store.window_s)
        return loads
