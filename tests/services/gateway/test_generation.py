"""The tests check that slow prompts and grammars are limited in number and delay no other request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from services.engine.grammar.grammar_checker import GrammarChecker
from services.gateway.bounded_thread_pool import BoundedThreadPool
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.errors import ApiError, ApiRefusal, client_errors
from services.gateway.generation import Generation, ModelCard
from services.gateway.generation_request import AnswerFormat, GenerationRequest
from services.gateway.preparation import INLINE_CHARS
from tests.services.demo import MODEL
from tests.services.engine.grammar.test_grammar_checker import MAX_SECONDS, slow
from tests.services.gateway.echo import EchoSource


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(MODEL, MAX_SECONDS)
    yield made
    made.close()


def test_long_prompts_are_refused_or_given_up_where_they_cannot_be_prepared(
    source: EchoSource, tokenizer: Tokenizer
) -> None:
    async def test() -> None:
        threads, may_finish = BoundedThreadPool(num_threads=1, max_open=2), threading.Event()
        generation = Generation(source, tokenizer, ModelCard("echo", 10**6, 1), threads=threads)
        long = "a" * (INLINE_CHARS + 1)
        running = asyncio.create_task(threads.run(may_finish.wait, 60))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="deadline passed before its prompt was ready") as late, client_errors():
            await generation.prepare(GenerationRequest(long, timeout=0.05))
        assert late.value.refusal is ApiRefusal.DEADLINE
        waiting = asyncio.create_task(generation.prepare(GenerationRequest(long)))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError) as refused, client_errors():
            await generation.prepare(GenerationRequest(long))
        assert (refused.value.refusal, refused.value.retry_after) == (ApiRefusal.OVERLOADED, 1)
        may_finish.set()
        [choice] = await waiting
        assert len(choice.prompt_token_ids) == len(long)
        await running

    asyncio.run(test())


def test_the_client_is_told_and_prompts_are_prepared_meanwhile(
    checker: GrammarChecker, source: EchoSource, tokenizer: Tokenizer
) -> None:
    async def prepare(generation: Generation, request: GenerationRequest) -> None:
        with client_errors():
            await generation.prepare(request)

    async def test() -> None:
        generation = Generation(source, tokenizer, ModelCard("echo", 10**6, 1), checker.check)
        formats = [AnswerFormat(slow(n), "structured_outputs.grammar") for n in range(5)]
        requests = [GenerationRequest("a", answer_format=answer_format) for answer_format in formats]
        slow_ones = [asyncio.create_task(prepare(generation, request)) for request in requests]
        await asyncio.sleep(0.1)
        await prepare(generation, GenerationRequest("a" * 100_000))
        assert not all(task.done() for task in slow_ones)
        for refused in await asyncio.gather(*slow_ones, return_exceptions=True):
            assert isinstance(refused, ApiError)
            assert refused.refusal is ApiRefusal.INVALID
            assert refused.message.startswith("structured_outputs.grammar cannot be used: it takes more than")

    asyncio.run(test())
