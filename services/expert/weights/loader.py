"""`Loader` loads the experts that a placement assigns to a shard, while the shard continues to compute."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from services.expert.transport.worker import Worker
from services.expert.weights.host import ExpertHost, StagedExperts
from services.expert.weights.load_order import Key, LoadOrder, Sources, keys_of
from services.expert.weights.promotion import Promoter
from services.expert.weights.transfer import PeerChannels, WeightSource
from services.expert.weights.weights import ExpertMetadata, Weights
from services.low_priority import run_in_thread

LOADS_AT_ONCE = 2  # one expert comes over the wire while another expert is packed


class Loader:
    """A `Loader` loads homes and standbys into an `ExpertHost`; the loader belongs to one event loop.

    Only one load may run at a time, but promotions may run during a load.
    """

    def __init__(self, host: ExpertHost, worker: Worker, source: WeightSource, promoter: Promoter) -> None:
        self.host, self.worker, self.source, self.promoter = host, worker, source, promoter

    async def load(self, order: LoadOrder) -> None:
        """Load the experts of `order` that the shard lacks, then give all experts of `order` their new roles at once.

        Raise ValueError if an expert does not exist, does not fit, or cannot be read or verified. In this case, nothing
        has changed.
        """
        host, worker = self.host, self.worker
        host.check_fits(order.homes, order.standby)
        self._check_known(order.sources)
        homes = keys_of(order.homes)
        new_homes = await self.promoter.pin_homes(homes)
        try:
            async with PeerChannels() as peers:
                staged = await self._stage(new_homes, keys_of(order.standby), order.sources, peers)
            await worker.run(lambda: host.commit(order.homes, order.standby, staged))
        except BaseException:
            await worker.run(lambda: host.free(new_homes))
            raise
        finally:
            await self.promoter.unpin(homes)

    def _check_known(self, sources: Sources) -> None:
        """Raise ValueError if the shard holds an expert with another checksum than `sources` expects."""
        for (layer, expert), expected in sources.expected.items():
            metadata = self.host.metadata((layer, expert))
            if metadata is not None and metadata.checksum != expected:
                numbers = f"the checksum {metadata.checksum:016x}, but {expected:016x} was expected"
                raise ValueError(f"Expert {expert} of layer {layer} is here with {numbers}; have it unloaded first.")

    async def _stage(
        self, new_homes: set[Key], standby: set[Key], sources: Sources, peers: PeerChannels
    ) -> StagedExperts:
        """Load `new_homes` into the memory reserved for them, and prepare the standbys that the shard lacks."""
        staged, host = StagedExperts(), self.host
        host_memory_left = host.standbys.host_budget - host.standbys.used_bytes

        async def load_home(key: Key) -> None:
            kept = host.standbys.get(key)
            weights = kept.weights if kept and kept.weights else await self.source.obtain(key, sources, peers)
            staged.metadata[key] = await run_in_thread(host.fill_device, key, weights)

        async def prepare_standby(key: Key) -> None:
            nonlocal host_memory_left
            fits = host.standby_bytes(key) <= host_memory_left
            host_memory_left -= host.standby_bytes(key) if fits else 0
            weights = await self._standby_weights(key, sources, peers, staged, fits)
            staged.standbys[key] = weights, sources.peers.get(key, "")

        await _for_each(sorted(new_homes), load_home)
        await _for_each(sorted(key for key in standby if key not in host.standbys), prepare_standby)
        for layer, expert in dict(new_homes).items():  # one expert of each layer is enough for the warm-up
            await run_in_thread(host.on_device.banks[layer].warm_up, expert)  # so that no request waits
        return staged

    async def _standby_weights(
        self, key: Key, sources: Sources, peers: PeerChannels, staged: StagedExperts, fits: bool
    ) -> Weights | None:
        """Return the weights of a new standby for host memory, or None if the weights do not fit there.

        An expert that does not fit is read nevertheless, for two reasons: an expert that cannot be read must not become
        a standby, and the load must report the `gain_exponent` of the expert.
        """
        host = self.host
        if host.is_home(key):
            held = await self.source.current(key) if fits else None
            return await run_in_thread(host.standbys.copy, held[0]) if held else None
        if not fits:
            sources = Sources(expected=sources.expected)  # no peer is asked, because its bytes would be thrown away
        weights = await self.source.obtain(key, sources, peers)
        staged.metadata[key] = ExpertMetadata(weights.checksum, await run_in_thread(weights.gain_exponent))
        return await run_in_thread(host.standbys.copy, weights) if fits else None


async def _for_each(keys: Iterable[Key], work: Callable[[Key], Awaitable[None]]) -> None:
    """Await `work` for each key, with at most LOADS_AT_ONCE keys at the same time.

    After an error no further key is started. Work that has started is finished, and then the error is raised.
    """
    left = deque(keys)

    async def run() -> None:
        while left:
            try:
                await work(left.popleft())
            except BaseException:
                left.clear()
                raise

    outcomes = await asyncio.gather(*(run() for _ in range(LOADS_AT_ONCE)), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
