"""A `ResumableRequest` continues on another backbone when its backbone is lost; a `FailoverBudget` limits how often.

The token at a position depends only on the tokens before the position, the request's parameters and its seed. The next
backbone therefore takes the prompt and the tokens sent so far together as its prompt, and continues with exactly the
tokens that the lost backbone would have sent. Tokens that the lost backbone computed but did not send are computed
again.
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

# The limits below count all failovers of one request together. The limits protect backbones from a request that makes
# every backbone crash or every step fail.
MAX_LOSSES = 3  # number of lost backbones at which the request fails
# Number of backbones that may end a request's stream without an error and do not count as lost. An upgrade stops all
# backbones, one after the other.
MAX_HANDOVERS = 16
# Number of retries after failed steps. The cause of a failed step may be one backbone (its device or its connection to
# the shards), so the request is retried once, on another backbone. If the request itself is the cause, every retry also
# fails the other requests in the same step, so there is no second retry.
MAX_FAILURES = 1
# Seconds that a request waits for a stream to another backbone. A new backbone needs about this time to start.
RESUME_WAIT_S = 30.0

# Called when a request continues on another backbone. The argument is the pause in seconds between the last output of
# the lost backbone and the first output of the next backbone, or None if no output came before the loss.
OnResumed = Callable[[float | None], None]
# Returns a stream for a request that lost its backbone, or None if no stream opens soon enough. The first argument is
# the endpoint that is used only if no other backbone answers. The second argument is the number of seconds to wait.
FindStream = Callable[[str, float], Awaitable[BackboneStream | None]]


@dataclass(frozen=True)
class FailoverBudget:
    """A `FailoverBudget` counts the failovers of one request, and allows no failover beyond the limits."""

    num_losses: int = 0
    num_handovers: int = 0
    num_failures: int = 0

    def spend(self, error: BackboneLost | EngineFailed) -> FailoverBudget:
        """Count one more failover, caused by `error`, and return the new budget.

        If a limit is reached, raises `error` for a failed step, and ApiError for a lost backbone.
        """
        if isinstance(error, EngineFailed):
            if self.num_failures == MAX_FAILURES:
                raise error
            return replace(self, num_failures=self.num_failures + 1)
        if error.is_handover and self.num_handovers < MAX_HANDOVERS:
            return replace(self, num_handovers=self.num_handovers + 1)
        if self.num_losses + 1 == MAX_LOSSES:
            sentence = f"{MAX_LOSSES} backbones that answered this request are gone; the request is not tried again."
            raise ApiError(ApiRefusal.UNAVAILABLE, sentence)
        return replace(self, num_losses=self.num_losses + 1)

    @property
    def num_failovers(self) -> int:
        return self.num_losses + self.num_handovers + self.num_failures


class ResumableRequest:
    """A `ResumableRequest` is one request together with the tokens that its client already has."""

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None,
        on_resumed: OnResumed,
    ) -> None:
        if params.seed is None and not params.is_greedy:
            params = params.varied(seed=secrets.randbits(64) - 2**63)  # all backbones must sample with the same seed
        self.request_id, self.prompt_token_ids, self.params = request_id, prompt_token_ids, params
        self._loop, self._on_resumed = asyncio.get_running_loop(), on_resumed
        self._deadline = None if timeout is None else self._loop.time() + timeout
        self._sent: list[int] = []
        self._first: TokenOutput | None = None
        self._last_at: float | None = None
        self._is_paused = False

    async def run(self, stream: BackboneStream, find_stream: FindStream) -> AsyncGenerator[TokenOutput, None]:
        """Yield the outputs of the request as if one backbone had generated all outputs.

        The request starts on `stream`; after each lost backbone, `find_stream` finds the next stream. Raises the
        exceptions of `Engine.generate`, and ApiError if the request cannot be continued.
        """
        budget = FailoverBudget()
        while True:
            try:
                async with aclosing(self._run_on(stream, budget)) as outputs:
                    async for output in outputs:
                        yield output
                return
            except (BackboneLost, EngineFailed) as error:
                budget, lost = budget.spend(error), error
            self._is_paused = True
            log.warning(
                "Request %s loses its backbone %s (%s) after %d tokens.",
                *(self.request_id, stream.endpoint, lost, len(self._sent)),
                extra={"request_id": self.request_id},
            )
            stream = await self._next(find_stream, stream.endpoint, lost)

    async def _next(
        self, find_stream: FindStream, last_endpoint: str, lost: BackboneLost | EngineFailed
    ) -> BackboneStream:
        left, wait_s = self._left(), RESUME_WAIT_S
        if isinstance(lost, EngineFailed):
            wait_s = 0.0
        stream = await find_stream(last_endpoint, wait_s if left is None else min(left, wait_s))
        if isinstance(lost, EngineFailed) and (stream is None or stream.endpoint == last_endpoint):
            raise lost
        if stream is None:
            self._left()
            sentence = (
                "The backbone that answered this request is gone, and no other backbone was found within "
                f"{RESUME_WAIT_S:g} s."
            )
            raise ApiError(ApiRefusal.UNAVAILABLE, sentence, retry_after=1)
        return stream

    def _left(self) -> float | None:
        """Return the seconds until the request's deadline, or None if the request has no deadline.

        A failover does not extend the deadline. Raises DeadlinePassed if no time is left.
        """
        if self._deadline is None:
            return None
        left = self._deadline - self._loop.time()
        if left <= 0:
            raise DeadlinePassed(f"The request's deadline passed after {len(self._sent)} generated tokens.")
        return left

    async def _run_on(self, stream: BackboneStream, budget: FailoverBudget) -> AsyncGenerator[TokenOutput, None]:
        # The request gets a new id for each failover, because a backbone that was given up may still hold the old id.
        name = f"{self.request_id}.{budget.num_failovers}" if budget.num_failovers else self.request_id
        sent = self._sent if budget.num_failovers else None
        outputs = stream.generate(name, self.prompt_token_ids, self.params, self._left(), sent)
        async with aclosing(outputs):
            async for output in outputs:
                yield self._record(output)

    def _record(self, output: TokenOutput) -> TokenOutput:
        """Remember the tokens of `output`, and return `output` as the client should see it.

        The client sees the id of the request, also after failovers that gave the request other ids.
        """
        now = self._loop.time()
        if self._is_paused:
            pause = None if self._last_at is None else now - self._last_at
            took = "" if pause is None else f" after a pause of {pause:.3f} s"
            log.info("Request %s continues%s.", self.request_id, took, extra={"request_id": self.request_id})
            self._on_resumed(pause)
            self._is_paused = False
        self._last_at = now
        self._sent += output.token_ids
        if self._first is None:
            self._first = output = replace(output, request_id=self.request_id)
            return output
        if output.request_id == self.request_id:
            return output
        # Clients see the queueing time and the use of the prefix cache that the first backbone reported.
        first = self._first
        return replace(
            output,
            request_id=self.request_id,
            num_cached=first.num_cached,
            cache_reason=first.cache_reason,
            queued_s=first.queued_s,
        )
