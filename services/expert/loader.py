"""How experts come to a shard: from peers, host memory or the checkpoint, verified, while the shard computes on."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
from torch import Tensor

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.options import CHANNEL_OPTIONS
from services.expert.host import ExpertFacts, ExpertHost, ExpertsByLayer, LoadedExperts, NoDeviceMemory, keys_of
from services.expert.standbys import Key
from services.expert.transfer import MAX_TRANSFER_BYTES, ByteBudget, PeerError, fetch
from services.expert.transport.wire import Refused
from services.expert.transport.worker import Worker
from services.expert.weights import Weights
from services.low_priority import aside, is_awaited

Read = Callable[[int, int], Mapping[str, Tensor]]  # (layer, expert) -> its tensors; ValueError names what is missing

LOADS_AT_ONCE = 2  # one comes over the wire while another one is packed
PROMOTE_TIMEOUT_S = 5.0  # that a call waits for experts that stand by, at most


@dataclass(frozen=True)
class LoadOrder:
    """What a shard is to hold and to stand by for; of some experts, the peer to ask first and the right checksum."""

    homes: ExpertsByLayer
    standby: ExpertsByLayer
    peers: Mapping[Key, str] = field(default_factory=dict)
    expected: Mapping[Key, int] = field(default_factory=dict)


class Peers:
    """Channels to peers while a load lasts; one that failed is not asked again."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.failed: set[str] = set()

    def __getitem__(self, endpoint: str) -> grpc.aio.Channel:
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        return self._channels[endpoint]

    async def __aenter__(self) -> Peers:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.values():
            await channel.close()


class Loader:
    """Fills one `ExpertHost`; belongs to one event loop. `load` is one at a time, promotions go on beside it."""

    def __init__(self, host: ExpertHost, worker: Worker, read: Read) -> None:
        self.host, self.worker, self.incoming = host, worker, ByteBudget(MAX_TRANSFER_BYTES)
        self.num_promotions = self.promotion_us = 0
        self._read = read
        self._promotions: dict[Key, asyncio.Task[None]] = {}
        self._admission, self._freed = asyncio.Lock(), asyncio.Event()

    # What a placement asks for ---------------------------------------------------------------------------------------

    async def load(self, order: LoadOrder) -> None:
        """Brings what is not there yet and makes it count, all or nothing; raises ValueError."""
        host, worker = self.host, self.worker
        host.check_fits(order.homes, order.standby)
        self._check_known(order)
        homes = keys_of(order.homes)
        new = await self._take_for_homes(homes)
        try:
            async with Peers() as peers:
                loaded = await self._bring(new, keys_of(order.standby), order, peers)
            await worker.run(lambda: host.settle(order.homes, order.standby, loaded))
        except BaseException:
            await worker.run(lambda: host.drop(new))
            raise
        finally:
            await self.release(homes)

    def _check_known(self, order: LoadOrder) -> None:
        for (layer, expert), expected in order.expected.items():
            known = self.host.known((layer, expert))
            if known is not None and known.checksum != expected:
                numbers = f"the checksum {known.checksum:016x}, but {expected:016x} was expected"
                raise ValueError(f"Expert {expert} of layer {layer} is here with {numbers}; have it unloaded first.")

    async def _take_for_homes(self, homes: set[Key]) -> set[Key]:
        async with self._admission:  # or promotions that come meanwhile would take the room
            while True:
                under_way = dict(self._promotions)
                if not homes & under_way.keys():
                    with suppress(NoDeviceMemory):
                        return await self.worker.run(lambda: self.host.take(homes, for_homes=True))
                assert under_way, "what is held fits, and what is promoted makes room"
                await asyncio.wait(under_way.values())

    async def _bring(self, new_homes: set[Key], standby: set[Key], order: LoadOrder, peers: Peers) -> LoadedExperts:
        loaded, host = LoadedExperts(), self.host
        room = [host.standbys.host_budget - host.standbys.used_bytes]

        async def bring_home(key: Key) -> None:
            weights = await self._from_memory_or(key, order, peers)
            loaded.known[key] = await self._to_device(key, weights)

        async def stand_by(key: Key) -> None:
            fits = host.nbytes(key) <= room[0]
            room[0] -= host.nbytes(key) if fits else 0
            loaded.standbys[key] = await self._prepare_standby(key, order, peers, loaded, fits)

        await _each(sorted(new_homes), bring_home)
        await _each(sorted(key for key in standby if key not in host.standbys), stand_by)
        for layer, expert in {key[0]: key for key in new_homes}.items():
            bank, held = host.banks[layer], expert[1]
            await aside(bank.warm_up, held)  # now, so that no request waits for it
        return loaded

    async def _from_memory_or(self, key: Key, order: LoadOrder, peers: Peers) -> Weights:
        standby = self.host.standbys.get(key)
        return standby.weights if standby and standby.weights else await self._obtain(key, order, peers)

    async def _prepare_standby(
        self, key: Key, order: LoadOrder, peers: Peers, loaded: LoadedExperts, fits: bool
    ) -> tuple[Weights | None, str]:
        """Reads an expert once even if it stays on disk: what cannot be read is no standby, and its gain counts."""
        host, endpoint = self.host, order.peers.get(key, "")
        if host.is_home(key):
            weights = Weights.of(await aside(host.banks[key[0]].tensors, key[1]), host.dtype)
            return weights if fits else None, endpoint
        sources = order if fits else LoadOrder({}, {}, {}, order.expected)  # bytes from a peer would be thrown away
        weights = await self._obtain(key, sources, peers)
        loaded.known[key] = ExpertFacts(weights.checksum, await aside(weights.gain_exponent))
        return await aside(self._keep, weights) if fits else None, endpoint

    async def _to_device(self, key: Key, weights: Weights) -> ExpertFacts:
        (layer, expert), known = key, self.host.known(key)
        bank, gain = self.host.banks[layer], known.gain if known else weights.gain
        await aside(bank.load, expert, weights.tensors, gain)
        return ExpertFacts(weights.checksum, bank.gain_exponent(expert))

    def _keep(self, weights: Weights) -> Weights:
        return weights.in_host_memory(is_pinned=self.host.device.type == "cuda")

    # Where it comes from ---------------------------------------------------------------------------------------------

    async def _obtain(self, key: Key, order: LoadOrder, peers: Peers, *, disk_first: bool = False) -> Weights:
        """From the peer that is named, else from the checkpoint; verified. Raises ValueError that names the expert."""
        endpoint, problems = order.peers.get(key, ""), []
        expected = order.expected.get(key)
        ways: list[tuple[str, Callable[[], Awaitable[Weights]]]] = [
            ("the checkpoint", lambda: aside(self.read_checkpoint, key, expected))
        ]
        if endpoint and endpoint not in peers.failed:
            from_peer = (f"the peer {endpoint}", lambda: self._from_peer(key, endpoint, peers, expected))
            ways = [*ways, from_peer] if disk_first else [from_peer, *ways]
        for where, way in ways:
            try:
                return await way()
            except (ValueError, OSError, PeerError) as error:
                problems.append(f"from {where}: {error}")
        raise ValueError(f"Expert {key[1]} of layer {key[0]} was not loaded {'; '.join(problems)}.")

    async def _from_peer(self, key: Key, endpoint: str, peers: Peers, expected: int | None) -> Weights:
        host = self.host
        async with self.incoming.hold(host.nbytes(key)):
            try:
                weights = await fetch(peers[endpoint], host.shapes[key[0]], key[1], host.dtype)
                check_expected(weights, expected)
                return weights
            except (PeerError, ValueError):
                peers.failed.add(endpoint)
                raise

    def read_checkpoint(self, key: Key, expected: int | None) -> Weights:
        """Reads and hashes, which takes its time; raises ValueError."""
        weights = Weights.of(self._read(*key), self.host.dtype)
        check_expected(weights, expected)
        return weights

    async def weights_of(self, key: Key) -> tuple[Weights, ExpertFacts] | None:
        """An expert from whichever tier has it, and what was found when it was loaded; None if it is not here."""
        known, host = self.host.known(key), self.host
        if known is None:
            return None
        standby = host.standbys.get(key)
        if standby is not None and (weights := standby.weights) is not None:
            return weights, known
        with suppress(KeyError):
            return Weights.of(await aside(host.banks[key[0]].tensors, key[1]), host.dtype), known
        return await aside(self.read_checkpoint, key, known.checksum), known

    # What calls ask for ----------------------------------------------------------------------------------------------

    async def promote(self, layer: int, experts: list[int], timeout_s: float) -> set[Key]:
        """Brings as many of these to the device as fit at once, at least one; they stay until they are released.

        Raises Refused: NOT_HOSTED where it cannot be done here, OVERLOADED where it cannot be done in time.
        """
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._admission.acquire()
        except TimeoutError:
            raise _too_late(layer, experts) from None
        try:
            keys = await self._take_slots(layer, experts, deadline)
        finally:
            self._admission.release()
        tasks = [self._promotions[key] for key in keys if key in self._promotions]
        done, late = await asyncio.wait(tasks, timeout=max(0, deadline - time.monotonic())) if tasks else ((), ())
        if late or any(task.exception() for task in done):
            await self.release(keys)
            failed = next((str(task.exception()) for task in done if task.exception()), "")
            raise Refused(pb.Refusal.NOT_HOSTED, failed, tuple(experts)) if failed else _too_late(layer, experts)
        return keys

    async def _take_slots(self, layer: int, experts: list[int], deadline: float) -> set[Key]:
        while True:
            self._freed.clear()
            with suppress(NoDeviceMemory):
                keys, new = await self.worker.run(lambda: self._take_now(layer, experts))
                for key in new:
                    self._promotions[key] = asyncio.create_task(self._promote(key))
                return keys
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._freed.wait()
            except TimeoutError:
                raise _too_late(layer, experts) from None

    def _take_now(self, layer: int, experts: list[int]) -> tuple[set[Key], set[Key]]:
        host = self.host
        if gone := [expert for expert in experts if (layer, expert) not in host.standbys]:
            detail = f"Experts {gone} of layer {layer} are not held here any more."
            raise Refused(pb.Refusal.NOT_HOSTED, detail, tuple(gone))
        if (num_slots := host.num_slots(layer)) < 1:
            detail = f"Experts {experts} of layer {layer} stand by, but no device memory is left to promote them to."
            raise Refused(pb.Refusal.NOT_HOSTED, detail, tuple(experts))
        keys = {(layer, expert) for expert in experts[:num_slots]}
        return keys, host.take(keys)

    async def _promote(self, key: Key) -> None:
        started, host = time.monotonic(), self.host
        is_awaited.set(True)
        try:
            kept = await self._load_promoted(key)
            await self.worker.run(lambda: host.settle_promoted(key, kept))
        except BaseException:
            await self.worker.run(lambda: host.drop([key]))
            raise
        finally:
            del self._promotions[key]
            self._freed.set()
        self.num_promotions += 1
        self.promotion_us += round((time.monotonic() - started) * 1e6)

    async def _load_promoted(self, key: Key) -> Weights | None:
        """Loads an expert that stands by; returns its weights where they were not in host memory and may stay there."""
        host, known, standby = self.host, self.host.known(key), self.host.standbys.get(key)
        if standby is None or known is None:
            raise ValueError(f"Expert {key[1]} of layer {key[0]} does not stand by here any more.")
        if (kept := standby.weights) is not None:
            await self._to_device(key, kept)
            return None
        async with Peers() as peers:
            order = LoadOrder({}, {}, {key: standby.peer} if standby.peer else {}, {key: known.checksum})
            weights = await self._obtain(key, order, peers, disk_first=True)
        await self._to_device(key, weights)
        return await aside(self._keep, weights) if weights.nbytes <= host.standbys.host_budget else None

    async def release(self, keys: Iterable[Key]) -> None:
        """Lets experts go that `promote` brought, when the call that asked for them is computed."""
        await self.worker.run(lambda: self.host.release(keys))
        self._freed.set()


def check_expected(weights: Weights, expected: int | None) -> None:
    """Raises ValueError; hashes the weights if nobody has yet."""
    checksum = weights.checksum
    if expected not in (None, checksum):
        numbers = f"the checksum {checksum:016x}, but {expected:016x} was expected"
        raise ValueError(f"it has {numbers}: its bytes are damaged or another checkpoint's")


def _too_late(layer: int, experts: list[int]) -> Refused:
    detail = f"Experts {experts} of layer {layer} stand by, and could not be promoted in time."
    return Refused(pb.Refusal.OVERLOADED, detail, tuple(experts))


async def _each(keys: Iterable[Key], work: Callable[[Key], Awaitable[None]]) -> None:
    """Works on a few at once; after an error on no more of them, but what was begun is finished."""
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
