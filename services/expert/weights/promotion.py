"""`Promoter` promotes standbys that requests need, and these requests wait in the `PromotionQueue` meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.wire import Refused
from services.expert.transport.worker import Worker
from services.expert.weights.device_experts import NoDeviceMemory
from services.expert.weights.host import ExpertHost, PendingRequest
from services.expert.weights.load_order import Key, Sources
from services.expert.weights.transfer import PeerChannels, WeightSource
from services.expert.weights.weights import Weights
from services.low_priority import is_request_waiting, run_in_thread

PROMOTE_TIMEOUT_S = 5.0  # maximum seconds that a request waits for promotions
IDLE_POLL_S = 0.01  # seconds between two checks of the number of parked requests


class Promoter:
    """A `Promoter` reserves device memory and promotes standbys into this memory; its methods run on one event loop.

    If several requests need the same expert, the expert is promoted once for all of these requests. To pin an expert is
    to reserve device memory for the expert and keep the memory until `unpin`.
    """

    def __init__(self, host: ExpertHost, worker: Worker, source: WeightSource) -> None:
        self.host, self.worker, self.source = host, worker, source
        self.num_promotions = self.promotion_us = 0
        self.in_progress: dict[Key, asyncio.Task[None]] = {}
        # Held by the caller that waits for device memory; the next caller waits for the lock.
        self._admission = asyncio.Lock()
        self._freed = asyncio.Event()  # set when device memory may have become available

    async def pin_homes(self, homes: set[Key]) -> set[Key]:
        """Pin device memory for the experts `homes`, and return the experts that must still be loaded.

        The caller must unpin `homes`. The method waits for promotions in progress that hold the memory, or that load an
        expert of `homes`.
        """
        async with self._admission:  # otherwise new promotions could take the memory again and again
            while True:
                in_progress = dict(self.in_progress)
                if not homes & in_progress.keys():
                    with suppress(NoDeviceMemory):
                        return await self.worker.run(lambda: self.host.on_device.pin(homes, for_homes=True))
                assert in_progress, "the homes fit into the budget, and every promoted expert may be evicted for them"
                await asyncio.wait(in_progress.values())

    async def unpin(self, keys: Iterable[Key]) -> None:
        """Remove one pin from each expert; an expert without pins may be evicted."""
        await self.worker.run(lambda: self.host.on_device.unpin(keys))
        self._freed.set()

    async def promote(self, layer: int, experts: list[int], timeout_s: float) -> set[Key]:
        """Promote and pin `experts`; if not all of them fit on the device together, take only the first that fit.

        At least one expert is promoted. Return the keys of the promoted experts, which the caller must unpin. Raise
        Refused with NOT_HOSTED if the shard cannot promote the experts, and with OVERLOADED if the promotions take
        longer than `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._admission.acquire()
        except TimeoutError:
            raise _too_late(layer, experts) from None
        try:
            keys = await self._pin_standbys(layer, experts, deadline)
        finally:
            self._admission.release()
        tasks = [self.in_progress[key] for key in keys if key in self.in_progress]
        done, late = await asyncio.wait(tasks, timeout=max(0, deadline - time.monotonic())) if tasks else ((), ())
        if late or any(task.exception() for task in done):
            await self.unpin(keys)
            failed = next((str(task.exception()) for task in done if task.exception()), "")
            raise Refused(pb.Refusal.NOT_HOSTED, failed, tuple(experts)) if failed else _too_late(layer, experts)
        return keys

    async def _pin_standbys(self, layer: int, experts: list[int], deadline: float) -> set[Key]:
        """Wait for device memory, pin the first of `experts` that fit together, and start the missing promotions.

        Return the keys of the pinned experts.
        """
        while True:
            self._freed.clear()
            with suppress(NoDeviceMemory):
                keys, new = await self.worker.run(lambda: self._pin_now(layer, experts))
                for key in new:
                    self.in_progress[key] = asyncio.create_task(self._promote(key))
                return keys
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._freed.wait()
            except TimeoutError:
                raise _too_late(layer, experts) from None

    def _pin_now(self, layer: int, experts: list[int]) -> tuple[set[Key], set[Key]]:
        """Pin the first of `experts` that fit; return the pinned keys and, of these, the keys that must be loaded."""
        host = self.host
        if gone := [expert for expert in experts if (layer, expert) not in host.standbys]:
            detail = f"Experts {gone} of layer {layer} are not held here any more."
            raise Refused(pb.Refusal.NOT_HOSTED, detail, tuple(gone))
        if (max_promoted := host.max_promoted(layer)) < 1:
            detail = f"Experts {experts} of layer {layer} stand by, but no device memory is left to promote them to."
            raise Refused(pb.Refusal.NOT_HOSTED, detail, tuple(experts))
        keys = {(layer, expert) for expert in experts[:max_promoted]}
        return keys, host.on_device.pin(keys)

    async def _promote(self, key: Key) -> None:
        """Load the expert `key` into its reserved device memory and allow requests to be computed with it.

        If the load fails, the memory is freed.
        """
        started, host = time.monotonic(), self.host
        is_request_waiting.set(True)
        try:
            copy = await self._load(key)
            await self.worker.run(lambda: host.commit_promotion(key, copy))
        except BaseException:
            await self.worker.run(lambda: host.free([key]))
            raise
        finally:
            del self.in_progress[key]
            self._freed.set()
        self.num_promotions += 1
        self.promotion_us += round((time.monotonic() - started) * 1e6)

    async def _load(self, key: Key) -> Weights | None:
        """Load a standby to the device; return a copy for host memory if the expert was on disk and the copy fits."""
        host, metadata, standby = self.host, self.host.metadata(key), self.host.standbys.get(key)
        if standby is None or metadata is None:
            raise ValueError(f"Expert {key[1]} of layer {key[0]} does not stand by here any more.")
        if (kept := standby.weights) is not None:
            await run_in_thread(host.fill_device, key, kept)
            return None
        async with PeerChannels() as peers:
            sources = Sources({key: standby.peer} if standby.peer else {}, {key: metadata.checksum})
            weights = await self.source.obtain(key, sources, peers, checkpoint_first=True)
        await run_in_thread(host.fill_device, key, weights)
        if (num_bytes := host.standby_bytes(key)) > host.standbys.host_budget:
            return None
        await self.worker.run(lambda: host.standbys.make_room(num_bytes))  # the copy may need the memory of others
        if (copy := await run_in_thread(host.standbys.copy, weights)) is not None:
            return copy
        await self.worker.run(lambda: host.standbys.drop_coldest(num_bytes))
        return await run_in_thread(host.standbys.copy, weights)


class PromotionQueue:
    """A `PromotionQueue` holds the requests that wait for promotions, at most `max_parked` requests at a time.

    Further requests are refused with OVERLOADED. A queue must be created on the event loop of its `Promoter`.
    """

    def __init__(self, promoter: Promoter, worker: Worker, max_parked: int) -> None:
        self.promoter, self.worker, self.max_parked = promoter, worker, max_parked
        self.num_parked = 0  # number of parked requests, changed on the worker's thread only
        # whether a parked request is being answered or parked again; the request then leaves the queue
        self._is_resuming = False
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def park(
        self,
        pending: PendingRequest,
        timeout_s: float,
        resume: Callable[[], None],
        refuse: Callable[[Refused], None],
    ) -> None:
        """Promote the experts that `pending` needs, then call `resume`, or call `refuse` if the promotion fails.

        `park` must be called on the worker's thread, which also calls `resume` or `refuse`.
        """
        if self.num_parked - self._is_resuming >= self.max_parked:
            detail = f"{self.num_parked} requests wait for experts that stand by; the bound is {self.max_parked}."
            refuse(Refused(pb.Refusal.OVERLOADED, detail))
            return
        self.num_parked += 1
        self._loop.call_soon_threadsafe(self._start, pending, timeout_s, resume, refuse)

    async def idle(self) -> None:
        """Wait until the queue holds no request."""
        while self.num_parked:
            await asyncio.sleep(IDLE_POLL_S)

    def _start(self, *arguments: object) -> None:
        task = asyncio.create_task(self._promote_and_resume(*arguments))  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _promote_and_resume(
        self,
        pending: PendingRequest,
        timeout_s: float,
        resume: Callable[[], None],
        refuse: Callable[[Refused], None],
    ) -> None:
        try:
            keys = await self.promoter.promote(pending.layer, pending.experts, timeout_s)
        except Exception as error:
            failed = Refused(pb.Refusal.FAILED, f"Promoting experts failed with {error!r}.")
            refused = error if isinstance(error, Refused) else failed
            await self.worker.run(lambda: self._leave(lambda: refuse(refused)))
        else:
            await self.worker.run(lambda: self._leave(resume))
            await self.promoter.unpin(keys)

    def _leave(self, then: Callable[[], None]) -> None:
        self._is_resuming = True
        then()  # `resume` parks the request again if some experts did not fit
        self._is_resuming = False
        self.num_parked -= 1


def _too_late(layer: int, experts: list[int]) -> Refused:
    detail = f"Experts {experts} of layer {layer} stand by, and could not be promoted in time."
    return Refused(pb.Refusal.OVERLOADED, detail, tuple(experts))
