import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from model.state import Batch, State
from services.engine.engine import Engine
from services.engine.request import DeadlinePassed, EngineFailed, EngineOverloaded, SamplingParams, TokenOutput
from tests.services.engine.tiny_model import DIM, EOS, VOCAB_SIZE, TinyModel, tiny_engine

GREEDY = SamplingParams(temperature=0, max_tokens=20)


@contextmanager
def started(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


async def collect(stream: AsyncGenerator[TokenOutput, None]) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


def generate_all(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    async def run() -> list[list[int]]:
        streams = [engine.generate(f"r{i}", prompt, params) for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*map(collect, streams))

    return asyncio.run(run())


def run_one(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY, **options: Any) -> list[int]:
    return asyncio.run(collect(engine.generate("one", prompt, params, **options)))


def make_prompts(count: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_idle(engine: Engine) -> None:
    stop_at = time.monotonic() + 5
    while engine.scheduler.has_work and time.monotonic() < stop_at:
        time.sleep(0.01)
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == stats.num_slots_taken == stats.num_blocks_taken == 0


@pytest.mark.parametrize(
    "limits",
    [
        {"num_slots": 1},
        {"num_slots": 8, "max_batch_tokens": 16},
        {"num_slots": 8, "max_batch_tokens": 16, "chunk_align": 8},
        {"num_slots": 8, "num_blocks": 20, "max_batch_tokens": 16},  # preempts
    ],
)
def test_engine_equals_naive_generation_however_it_is_scheduled(limits: dict[str, int]) -> None:
    model, prompts = TinyModel(), make_prompts(24)
    expected = [model.naive_greedy(prompt, 20) for prompt in prompts]
    with started(tiny_engine(model, **limits)) as engine:
        assert generate_all(engine, prompts, GREEDY) == expected
        assert_idle(engine)
        assert engine.is_healthy
        assert (engine.stats().num_preemptions > 0) == ("num_blocks" in limits)
    assert max(model.num_tokens) <= engine.scheduler.config.max_batch_tokens


def test_sampling_depends_on_the_seed_alone() -> None:
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=11, max_tokens=16, ignore_eos=True)
    prompts = make_prompts(12)
    with started(tiny_engine()) as engine:
        together = generate_all(engine, prompts, params)
        assert together == [run_one(engine, prompt, params) for prompt in prompts]
        assert run_one(engine, prompts[0], SamplingParams(temperature=1.5, seed=12, max_tokens=16)) != together[0]
        unseeded = SamplingParams(temperature=1.5, max_tokens=16, ignore_eos=True)
        assert run_one(engine, prompts[0], unseeded) != run_one(engine, prompts[0], unseeded)


def test_a_request_ends_at_eos_stop_tokens_and_min_tokens() -> None:
    model = TinyModel()
    prompt = next(p for p in make_prompts(200, 6) if 2 <= len(model.naive_greedy(p, 20)) < 20)
    short = model.naive_greedy(prompt, 20)
    with started(tiny_engine(model)) as engine:
        assert run_one(engine, prompt) == short
        assert short[-1] == EOS
        assert len(run_one(engine, prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))) == 20
        stop = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=(short[0],))
        assert run_one(engine, prompt, stop) == short[:1]
        longer = run_one(engine, prompt, SamplingParams(temperature=0, max_tokens=20, min_tokens=len(short) + 1))
        assert len(longer) > len(short)
        assert EOS not in longer[: len(short) + 1]


def test_usage_counts_and_the_last_output_names_its_reason() -> None:
    async def run(engine: Engine) -> list[TokenOutput]:
        return [output async for output in engine.generate("x", [3, 4, 5], params)]

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with started(tiny_engine()) as engine:
        outputs = asyncio.run(run(engine))
    assert [o.num_generated for o in outputs] == [1, 2, 3, 4]
    assert [o.finish_reason for o in outputs] == [None, None, None, "length"]
    assert {(o.request_id, o.num_prompt) for o in outputs} == {("x", 3)}


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], GREEDY, r"prompt must hold at least one token\."),
        ([1, VOCAB_SIZE], GREEDY, r"prompt holds the token id 50; allowed are 0 to 49\."),
        ([-1], GREEDY, r"prompt holds the token id -1; allowed are 0 to 49\."),
        ([1], SamplingParams(stop_token_ids=(99,)), r"stop_token_ids holds the token id 99; allowed are 0 to 49\."),
        (
            [1] * 256,
            SamplingParams(),
            r"of 256 tokens and an answer of 1 make 257 tokens; at most 256 are allowed",
        ),
        ([1] * 240, GREEDY, r"The prompt of 240 tokens and an answer of 20 make 260 tokens; at most 256 are allowed"),
    ],
)
def test_requests_that_can_never_run_are_refused(prompt: list[int], params: SamplingParams, sentence: str) -> None:
    with started(tiny_engine()) as engine:
        with pytest.raises(ValueError, match=sentence):
            run_one(engine, prompt, params)
        assert_idle(engine)


def test_a_request_larger_than_memory_is_refused_with_the_numbers() -> None:
    with (
        started(tiny_engine(num_blocks=10)) as engine,
        pytest.raises(ValueError, match=r"make 50 tokens; at most 40 are allowed, which is all that memory holds\."),
    ):
        run_one(engine, [1] * 30)


def test_a_client_that_goes_away_frees_its_memory() -> None:
    async def leave_early(engine: Engine) -> None:
        async with aclosing(engine.generate("x", [1, 2], endless)) as stream:
            await anext(stream)
        async with asyncio.timeout(5):
            while engine.stats().num_slots_taken:
                await asyncio.sleep(0.001)

    async def cancelled(engine: Engine) -> None:
        task = asyncio.create_task(collect(engine.generate("x", [1, 2], endless)))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    endless = SamplingParams(temperature=0, ignore_eos=True)
    with started(tiny_engine()) as engine:
        asyncio.run(leave_early(engine))
        asyncio.run(cancelled(engine))
        assert_idle(engine)
        assert run_one(engine, [1, 2]) == TinyModel().naive_greedy([1, 2], 20)


def test_more_requests_than_may_wait_are_refused() -> None:
    async def run(engine: Engine) -> list[Any]:
        streams = [collect(engine.generate(str(i), [1, 2], GREEDY)) for i in range(12)]
        return await asyncio.gather(*streams, return_exceptions=True)

    model = SlowModel()
    with started(tiny_engine(model, num_slots=1, max_waiting=4)) as engine:
        results = asyncio.run(run(engine))
        assert_idle(engine)
    refused = [result for result in results if isinstance(result, EngineOverloaded)]
    served = [result for result in results if not isinstance(result, EngineOverloaded)]
    assert refused
    assert refused[0].retry_after > 0
    assert len(served) in (4, 5)  # four wait; the first may be running already
    assert all(result == model.naive_greedy([1, 2], 20) for result in served)


def test_one_request_id_belongs_to_one_open_request() -> None:
    async def run(engine: Engine) -> None:
        async with aclosing(engine.generate("same", [1, 2], SamplingParams(temperature=0, ignore_eos=True))) as stream:
            await anext(stream)
            with pytest.raises(ValueError, match="request_id 'same' is in use"):
                await collect(engine.generate("same", [1], GREEDY))

    with started(tiny_engine()) as engine:
        asyncio.run(run(engine))
        assert run_one(engine, [1, 2]) == run_one(engine, [1, 2])


def test_a_deadline_ends_a_request() -> None:
    with started(tiny_engine(SlowModel())) as engine:
        with pytest.raises(DeadlinePassed, match=r"deadline passed after \d+ generated tokens"):
            run_one(engine, [1, 2], SamplingParams(temperature=0, ignore_eos=True), timeout=0.05)
        assert_idle(engine)


class SlowModel(TinyModel):
    def forward(self, batch: Batch, state: State) -> Tensor:
        time.sleep(0.005)
        return super().forward(batch, state)


class FailingModel(TinyModel):
    """Fails while told to."""

    is_failing = False

    def forward(self, batch: Batch, state: State) -> Tensor:
        if self.is_failing:
            raise ConnectionError("no shard answered.")
        return super().forward(batch, state)


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on() -> None:
    model = FailingModel()
    with started(tiny_engine(model)) as engine:
        for failures in (1, 2, 3):
            model.is_failing = True
            with pytest.raises(EngineFailed, match=r"failed with ConnectionError: no shard answered\."):
                run_one(engine, [1, 2])
            assert engine.is_healthy == (failures < 3)
        model.is_failing = False
        assert run_one(engine, [1, 2]) == model.naive_greedy([1, 2], 20)
        assert engine.is_healthy
        assert_idle(engine)
        assert engine.stats().num_failed_steps == 3


def test_an_outage_elsewhere_fails_requests_and_leaves_the_engine_healthy() -> None:
    model = FailingModel()
    with started(tiny_engine(model, outages=(ConnectionError,))) as engine:
        model.is_failing = True
        for _ in range(4):
            with pytest.raises(EngineFailed, match=r"failed with ConnectionError: no shard answered\."):
                run_one(engine, [1, 2])
            assert engine.is_healthy
        assert engine.stats().num_failed_steps == 4
        model.is_failing = False
        assert run_one(engine, [1, 2]) == model.naive_greedy([1, 2], 20)


class PoisonedModel(TinyModel):
    """Has no number to give where the token 7 went in last."""

    def logits(self, hidden_SD: Tensor) -> Tensor:
        logits_SV = super().logits(hidden_SD)
        logits_SV[(hidden_SD[:, :DIM] == self.recur(torch.zeros(DIM), 7)).all(dim=-1)] = torch.nan
        return logits_SV


def test_logits_that_are_no_numbers_fail_their_own_request_alone() -> None:
    async def run(engine: Engine) -> list[Any]:
        streams = [collect(engine.generate(str(prompt), prompt, GREEDY)) for prompt in ([1, 2], [7], [3, 4])]
        return await asyncio.gather(*streams, return_exceptions=True)

    model = PoisonedModel()
    with started(tiny_engine(model)) as engine:
        first, failed, last = asyncio.run(run(engine))
        assert_idle(engine)
        assert engine.stats().num_failed_steps == 0
    assert [first, last] == [model.naive_greedy(prompt, 20) for prompt in ([1, 2], [3, 4])]
    assert isinstance(failed, EngineFailed)
    assert str(failed) == "The model's logits hold NaN or infinity, so no token can be chosen from them."


def test_stopping_ends_open_streams_and_refuses_new_ones() -> None:
    async def run(engine: Engine) -> None:
        async with aclosing(engine.generate("x", [1, 2], SamplingParams(ignore_eos=True))) as stream:
            await anext(stream)
            await asyncio.to_thread(engine.stop)
            with pytest.raises(EngineFailed, match="was stopped"):
                await collect(stream)
        with pytest.raises(EngineFailed, match="not running"):
            await collect(engine.generate("y", [1, 2], GREEDY))

    engine = tiny_engine(SlowModel())
    engine.start()
    asyncio.run(run(engine))
    assert not engine.is_healthy
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_streams_of_several_event_loops_share_a_batch() -> None:
    model, found = TinyModel(), dict[int, list[int]]()

    def client(i: int) -> None:
        found[i] = asyncio.run(collect(engine.generate(str(i), [i, i + 1], GREEDY)))

    with started(tiny_engine(model)) as engine:
        threads = [threading.Thread(target=client, args=(i,)) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: model.naive_greedy([i, i + 1], 20) for i in range(1, 5)}
