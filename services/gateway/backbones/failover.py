"""A request that outlives the backbones which answer it: what one has sent is where the next goes on.

The token at a position is a function of the tokens before it, the request's parameters and its seed, so the next
backbone computes prompt and answer so far like a prompt, and goes on with the very tokens that the first would have
sent. What a client has is what was taken from here; what a backbone computed beyond that is computed again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.engine.contract.errors import DeadlinePassed, EngineFailed
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.gateway.backbones.backbone_stream import BackboneLost, BackboneStream
from services.gateway.errors import ApiError, ApiRefusal

log = logging.getLogger(__name__)

# One request's, from its start to its end. The bounds are for a request that is itself what kills or fails backbones.
MAX_LOSSES = 3  # backbones that it may lose
MAX_HANDOVERS = 16  # by backbones that stop in good order, as one after another does in an upgrade
# A failed step may be the fault of one backbone (its device, its way to the shards): that is worth one try on another,
# if one is there. Where the request itself is the cause it fails there too, and the steps of others with it: no more.
MAX_FAILURES = 1
RESUME_WAIT_S = 30.0  # for another backbone, where there is none: about what starting one anew takes

OnResumed = Callable[[float | None], None]  # with the seconds between two outputs that it took, if there were two
Pick = Callable[[str, float], Awaitable[BackboneStream | None]]  # not that endpoint if there is another; seconds


@dataclass(frozen=True)
class FailoverBudget:
    """What a request has been through."""

    num_losses: int = 0
    num_handovers: int = 0
    num_failures: int = 0

    def after(self, error: BackboneLost | EngineFailed) -> FailoverBudget:
        """Raises ApiError or `error` where that was the last trial."""
        if isinstance(error, EngineFailed):
            if self.num_failures == MAX_FAILURES:
                raise error
            return replace(self, num_failures=self.num_failures + 1)
        if error.is_handover and self.num_handovers < MAX_HANDOVERS:
            return replace(self, num_handovers=self.num_handovers + 1)
        if self.num_losses + 1 == MAX_LOSSES:
            sentence = f"{MAX_LOSSES} backbones that answered this request are gone; it is not tried on another."
            raise ApiError(ApiRefusal.UNAVAILABLE, sentence)
        return replace(self, num_losses=self.num_losses + 1)

    @property
    def number(self) -> int:
        return self.num_losses + self.num_handovers + self.num_failures


class ResumableRequest:
    """One request, with what its client has of it."""

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None,
        on_resumed: OnResumed,
    ) -> None:
        if params.seed is None and not params.is_greedy:
            params = replace(params, seed=secrets.randbits(64) - 2**63)  # every backbone is to draw with the same
        self.request_id, self.prompt_token_ids, self.params = request_id, prompt_token_ids, params
        self._loop, self._on_resumed = asyncio.get_running_loop(), on_resumed
        self._deadline = None if timeout is None else self._loop.time() + timeout
        self._sent: list[int] = []
        self._first: TokenOutput | None = None
        self._last_at: float | None = None
        self._is_paused = False

    async def run(self, stream: BackboneStream, pick: Pick) -> AsyncGenerator[TokenOutput, None]:
        """Yields outputs as if one backbone had made them. Raises what `Engine.generate` raises, and ApiError."""
        trials = FailoverBudget()
        while True:
            try:
                async with aclosing(self._go_on(stream, trials)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except (BackboneLost, EngineFailed) as error:
                trials, lost = trials.after(error), error
            self._is_paused = True
            told = (self.request_id, stream.endpoint, lost, len(self._sent))
            log.warning(
                "Request %s loses its backbone %s (%s) after %d tokens.", *told, extra={"request_id": self.request_id}
            )
            stream = await self._next(pick, stream.endpoint, lost)

    async def _next(self, pick: Pick, last_endpoint: str, lost: BackboneLost | EngineFailed) -> BackboneStream:
        left, wait_s = self._left(), RESUME_WAIT_S
        if isinstance(lost, EngineFailed):
            wait_s = 0.0
        stream = await pick(last_endpoint, wait_s if left is None else min(left, wait_s))
        if isinstance(lost, EngineFailed) and (stream is None or stream.endpoint == last_endpoint):
            raise lost
        if stream is None:
            self._left()
            sentence = f"The backbone that answered this request is gone, and no other came within {RESUME_WAIT_S:g} s."
            raise ApiError(ApiRefusal.UNAVAILABLE, sentence, retry_after=1)
        return stream

    def _left(self) -> float | None:
        """Seconds to the deadline, which holds whatever backbones do."""
        if self._deadline is None:
            return None
        left = self._deadline - self._loop.time()
        if left <= 0:
            raise DeadlinePassed(f"The request's deadline passed after {len(self._sent)} generated tokens.")
        return left

    async def _go_on(self, stream: BackboneStream, trials: FailoverBudget) -> AsyncGenerator[TokenOutput, None]:
        # An id of its own for each trial: a backbone that was given up may hold the last one still.
        name = f"{self.request_id}.{trials.number}" if trials.number else self.request_id
        sent = self._sent if trials.number else None
        outputs = stream.generate(name, self.prompt_token_ids, self.params, self._left(), sent)
        async with aclosing(outputs):
            async for output in outputs:
                yield self._noted(output)

    def _noted(self, output: TokenOutput) -> TokenOutput:
        now = self._loop.time()
        if self._is_paused:
            pause = None if self._last_at is None else now - self._last_at
            took = "" if pause is None else f" after a pause of {pause:.3f} s"
            log.info("Request %s goes on%s.", self.request_id, took, extra={"request_id": self.request_id})
            self._on_resumed(pause)
            self._is_paused = False
        self._last_at = now
        self._sent += output.token_ids
        if self._first is None:
            self._first = output = replace(output, request_id=self.request_id)
            return output
        if output.request_id == self.request_id:
            return output
        # The client was told once how the request began, and is charged for it once.
        first = self._first
        return replace(
            output,
            request_id=self.request_id,
            num_cached=first.num_cached,
            cache_reason=first.cache_reason,
            queued_s=first.queued_s,
        )
