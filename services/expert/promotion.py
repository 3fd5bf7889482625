"""Requests that wait until the experts that they ask for are on the device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.host import PartialResult
from services.expert.loader import Loader
from services.expert.transport.wire import Refused
from services.expert.transport.worker import Worker

IDLE_POLL_S = 0.01


class PromotionQueue:
    """At most `max_parked` requests wait, the rest are refused as OVERLOADED; made on the event loop of the loader."""

    def __init__(self, loader: Loader, worker: Worker, max_parked: int) -> None:
        self.loader, self.worker, self.max_parked = loader, worker, max_parked
        self.num_parked = 0  # changed by the worker's thread alone
        self._is_resuming = False  # then one of them has left already, unless it comes back
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def park(
        self,
        unfinished: PartialResult,
        timeout_s: float,
        resume: Callable[[], None],
        refuse: Callable[[Refused], None],
    ) -> None:
        """On the worker's thread, where later `resume` or `refuse` is called."""
        if self.num_parked - self._is_resuming >= self.max_parked:
            detail = f"{self.num_parked} requests wait for experts that stand by; the bound is {self.max_parked}."
            refuse(Refused(pb.Refusal.OVERLOADED, detail))
            return
        self.num_parked += 1
        self._loop.call_soon_threadsafe(self._start, unfinished, timeout_s, resume, refuse)

    async def idle(self) -> None:
        """Returns when nobody waits."""
        while self.num_parked:
            await asyncio.sleep(IDLE_POLL_S)

    def _start(self, *arguments: object) -> None:
        task = asyncio.create_task(self._wake(*arguments))  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wake(
        self,
        unfinished: PartialResult,
        timeout_s: float,
        resume: Callable[[], None],
        refuse: Callable[[Refused], None],
    ) -> None:
        try:
            keys = await self.loader.promote(unfinished.layer, unfinished.experts, timeout_s)
        except Exception as error:
            failed = Refused(pb.Refusal.FAILED, f"Promoting experts failed with {error!r}.")
            refused = error if isinstance(error, Refused) else failed
            await self.worker.run(lambda: self._leave(lambda: refuse(refused)))
        else:
            await self.worker.run(lambda: self._leave(resume))
            await self.loader.release(keys)

    def _leave(self, then: Callable[[], None]) -> None:
        self._is_resuming = True
        then()  # may park it again, for what did not fit this time
        self._is_resuming = False
        self.num_parked -= 1
