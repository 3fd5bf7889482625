from __future__ import annotations

import asyncio
import threading

import pytest

from services.engine.contract.errors import EngineOverloaded
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.errors import ApiError, ApiRefusal, client_errors
from services.gateway.generation import INLINE_CHARS, Generation, ModelCard
from services.gateway.generation_request import GenerationRequest
from services.gateway.thread_pool import BoundedThreadPool
from tests.services.gateway.echo import EchoSource


def test_beyond_the_most_at_a_time_work_is_refused() -> None:
    async def test() -> None:
        threads, going_on = BoundedThreadPool(num_threads=1, max_open=2), threading.Event()
        running, waiting = (asyncio.create_task(threads.run(going_on.wait, 60)) for _ in range(2))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineOverloaded, match="2 requests are being tokenized or checked"):
            await threads.run(sum, [1, 2])
        waiting.cancel()  # it leaves the line, and another may come
        await asyncio.wait([waiting])
        last = asyncio.create_task(threads.run(sum, [1, 2]))
        await asyncio.sleep(0.05)
        going_on.set()
        assert await running
        assert await last == 3

    asyncio.run(test())


def test_long_prompts_are_refused_or_given_up_where_they_cannot_be_prepared(
    source: EchoSource, tokenizer: Tokenizer
) -> None:
    async def test() -> None:
        threads, going_on = BoundedThreadPool(num_threads=1, max_open=2), threading.Event()
        generation = Generation(source, tokenizer, ModelCard("echo", 10**6, 1), threads=threads)
        long = "a" * (INLINE_CHARS + 1)
        running = asyncio.create_task(threads.run(going_on.wait, 60))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="deadline passed before its prompt was ready") as late, client_errors():
            await generation.prepare([GenerationRequest(long, timeout=0.05)])
        assert late.value.refusal is ApiRefusal.DEADLINE
        waiting = asyncio.create_task(generation.prepare([GenerationRequest(long)]))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError) as refused, client_errors():
            await generation.prepare([GenerationRequest(long)])
        assert (refused.value.refusal, refused.value.retry_after) == (ApiRefusal.OVERLOADED, 1)
        going_on.set()
        [choice] = await waiting
        assert len(choice.prompt_token_ids) == len(long)
        await running

    asyncio.run(test())
