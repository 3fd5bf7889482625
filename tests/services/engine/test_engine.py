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
from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar, GrammarKind, LogitBias, SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.engine.engine import Engine
from services.engine.runner import Runner
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
    stop_at = time.monotonic() + 60
    while engine.scheduler.has_work and time.monotonic() < stop_at:
        time.sleep(0.01)
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == stats.num_slots_taken == stats.num_blocks_taken == 0


@pytest.mark.parametrize("has_prefix_cache", [True, False])
@pytest.mark.parametrize("max_draft_tokens", [0, 3])
@pytest.mark.parametrize(
    "limits",
    [
        {"num_slots": 1},
        {"num_slots": 8, "max_batch_tokens": 16},
        {"num_slots": 8, "max_batch_tokens": 16, "chunk_align": 8, "checkpoint_align": 8},
        {"num_slots": 8, "num_blocks": 20, "max_batch_tokens": 16},  # few pages, so that requests are preempted
        {"num_slots": 3, "num_checkpoint_slots": 6, "checkpoint_interval": 8},
    ],
)
def test_engine_equals_naive_generation_however_it_is_scheduled(
    limits: dict[str, int], max_draft_tokens: int, has_prefix_cache: bool
) -> None:
    model, prompts = TinyModel(), make_prompts(16)
    prompts += [[*prompts[i % 3], *prompts[i]] for i in range(8)]
    expected = [model.naive_greedy(prompt, 20) for prompt in prompts]
    options = {**limits, "max_draft_tokens": max_draft_tokens, "has_prefix_cache": has_prefix_cache}
    with started(tiny_engine(model, **options)) as engine:
        assert generate_all(engine, prompts, GREEDY) == expected
        assert_idle(engine)
        assert engine.is_healthy
        stats = engine.stats()
        assert (stats.num_preemptions > 0) == ("num_blocks" in limits)
        assert (sum(stats.drafted_by_position) > 0) == (max_draft_tokens > 0)
        assert (stats.num_checkpoints > 0) == has_prefix_cache
        assert sum(stats.cache_reasons.values()) == len(prompts)
        # The same prompts, sent again, start from states that the first answers left in the cache.
        assert generate_all(engine, prompts, GREEDY) == expected
        assert (engine.stats().num_cached_tokens > stats.num_cached_tokens) == has_prefix_cache
        assert_idle(engine)
    assert max(model.num_tokens) <= engine.scheduler.config.max_batch_tokens


def test_sampling_depends_on_the_seed_alone() -> None:
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=11, max_tokens=16, ignore_eos=True)
    prompts = make_prompts(12)
    with started(tiny_engine(max_draft_tokens=0, has_prefix_cache=False)) as engine:
        undrafted = generate_all(engine, prompts, params)
    with started(tiny_engine()) as engine:
        together = generate_all(engine, prompts, params)
        assert together == undrafted
        assert sum(engine.stats().accepted_by_position) > 0
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
    with started(tiny_engine(max_draft_tokens=0)) as engine:
        outputs = asyncio.run(run(engine))
    assert [o.num_generated for o in outputs] == [1, 2, 3, 4]
    assert [o.finish_reason for o in outputs] == [None, None, None, "length"]
    assert {(o.request_id, o.num_prompt, o.num_cached, o.cache_reason) for o in outputs} == {("x", 3, 0, "too_short")}
    assert all(o.queued_s >= 0 for o in outputs)


def test_drafts_bring_several_tokens_a_step_and_are_counted_by_position() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with started(tiny_engine()) as engine:
        assert len(run_one(engine, [3, 4, 5], params)) == 60
        stats = engine.stats()
    assert stats.num_steps < 60
    assert len(stats.drafted_by_position) >= 1
    assert all(a <= d for a, d in zip(stats.accepted_by_position, stats.drafted_by_position, strict=True))
    assert stats.num_generated_tokens == 60
    assert stats.num_prompt_tokens == 3


def test_logprobs_of_the_prompt_come_once_and_forgo_reuse() -> None:
    async def run(engine: Engine, prompt: list[int]) -> list[TokenOutput]:
        return [output async for output in engine.generate("x", prompt, params)]

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    [prompt] = [p for p in make_prompts(30) if len(p) == 35][:1]
    with started(tiny_engine(max_batch_tokens=16)) as engine:
        first, second = asyncio.run(run(engine, prompt)), asyncio.run(run(engine, prompt))
    for outputs in (first, second):
        assert [bool(o.prompt_logprobs) for o in outputs] == [True] + [False] * (len(outputs) - 1)
        of_prompt = outputs[0].prompt_logprobs
        assert of_prompt[0] is None
        assert [entry.token_id for entry in of_prompt[1:] if entry] == prompt[1:]
        assert [entry.token_id for o in outputs for entry in o.logprobs] == [t for o in outputs for t in o.token_ids]
        assert {o.cache_reason for o in outputs} == {"prompt_logprobs"}
    assert first[0].prompt_logprobs == second[0].prompt_logprobs


def test_the_log_tells_what_became_of_every_request(caplog: pytest.LogCaptureFixture) -> None:
    async def leave(engine: Engine) -> None:
        async with aclosing(engine.generate("left", [1, 2], SamplingParams(temperature=0, ignore_eos=True))) as stream:
            await anext(stream)

    with caplog.at_level("INFO", "services.engine.engine"), started(tiny_engine(SlowModel())) as engine:
        run_one(engine, [3, 4, 5], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        asyncio.run(leave(engine))
        with pytest.raises(DeadlinePassed):
            run_one(engine, [1, 2], SamplingParams(temperature=0, ignore_eos=True), timeout=0.03)
        assert_idle(engine)
    records = [vars(record) for record in caplog.records if hasattr(record, "request_id")]
    reasons = {(record["request_id"], record["finish_reason"]) for record in records}
    assert reasons == {("one", "length"), ("left", "cancelled"), ("one", "deadline")}
    assert len(records) == 3
    first = records[0]
    assert (first["num_prompt_tokens"], first["num_generated_tokens"], first["cache_reason"]) == (3, 4, "too_short")
    assert 0 <= first["queued_s"] <= first["first_token_s"] <= first["total_s"] < 60


def test_a_grammar_is_compiled_off_the_engines_thread_before_the_request_is_queued() -> None:
    compiled_by: list[str] = []

    def compile_grammar(grammar: Grammar) -> None:
        compiled_by.append(threading.current_thread().name)
        raise ValueError(f"grammar {grammar.text!r} cannot be used.")

    params = SamplingParams(max_tokens=2, grammar=Grammar(GrammarKind.REGEX, "("))
    with started(tiny_engine(compile_grammar=compile_grammar)) as engine:
        with pytest.raises(ValueError, match=r"grammar '\(' cannot be used\."):
            run_one(engine, [1, 2], params)
        assert_idle(engine)
    with started(tiny_engine()) as engine, pytest.raises(ValueError, match="this server has no tokenizer"):
        run_one(engine, [1, 2], params)
    assert len(compiled_by) == 1
    assert compiled_by[0] not in ("engine", "MainThread")


def test_grammars_being_compiled_are_bounded_and_keep_to_the_deadline() -> None:
    may_go_on = threading.Event()

    def compile_grammar(grammar: Grammar) -> None:
        may_go_on.wait(60)
        raise ValueError("grammar cannot be used.")

    async def run(engine: Engine) -> list[Any]:
        streams = [collect(engine.generate(str(i), [1, 2], params, timeout=0.1)) for i in range(7)]
        return await asyncio.gather(*streams, return_exceptions=True)

    params = SamplingParams(max_tokens=2, grammar=Grammar(GrammarKind.REGEX, "a"))
    with started(tiny_engine(compile_grammar=compile_grammar, max_waiting=5)) as engine:
        results = asyncio.run(run(engine))
        assert [type(result) for result in results] == [DeadlinePassed] * 5 + [EngineOverloaded] * 2
        assert "5 requests are being compiled" in str(results[-1])
        may_go_on.set()
        stop_at = time.monotonic() + 60
        while True:  # repeat until the abandoned compilations have ended
            with pytest.raises((ValueError, EngineOverloaded)) as refused:
                run_one(engine, [1, 2], params)
            if isinstance(refused.value, ValueError) or time.monotonic() > stop_at:
                break
        assert str(refused.value) == "grammar cannot be used."
        assert_idle(engine)
    with pytest.raises(EngineFailed, match="not running"):
        run_one(engine, [1, 2], params)


def test_a_higher_priority_preempts_and_changes_no_token() -> None:
    async def run(engine: Engine) -> list[list[int]]:
        low = [asyncio.create_task(collect(engine.generate(f"low{i}", prompts[i], slow))) for i in range(3)]
        while engine.stats().num_running < 2:
            await asyncio.sleep(0.005)
        high = await collect(engine.generate("high", prompts[3], urgent))
        assert not all(task.done() for task in low)
        return [*[await task for task in low], high]

    model, prompts = SlowModel(), make_prompts(4)
    slow = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, priority=1)
    urgent = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with started(tiny_engine(num_slots=2, max_draft_tokens=0)) as engine:
        expected = [run_one(engine, prompt, urgent if i == 3 else slow) for i, prompt in enumerate(prompts)]
    with started(tiny_engine(model, num_slots=2)) as engine:
        assert asyncio.run(run(engine)) == expected
        assert engine.stats().num_preemptions == 1
        assert_idle(engine)
        assert engine.runner.drafter is not None
        assert not engine.runner.drafter._unread
    assert Runner(model, engine.runner.state, has_drafts=False).drafter is None


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], GREEDY, r"prompt must hold at least one token\."),
        ([1, VOCAB_SIZE], GREEDY, r"prompt holds the token id 50; allowed are 0 to 49\."),
        ([-1], GREEDY, r"prompt holds the token id -1; allowed are 0 to 49\."),
        ([1], SamplingParams(stop_token_ids=(99,)), r"stop_token_ids holds the token id 99; allowed are 0 to 49\."),
        (
            [1],
            SamplingParams(logit_bias=LogitBias.of({50: 1.0})),
            r"logit_bias holds the token id 50; allowed are 0 to 49\.",
        ),
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
        async with asyncio.timeout(60):
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
    assert 1 <= refused[0].retry_after <= 60
    assert engine.stats().num_refused == len(refused)
    assert len(served) in (4, 5)  # four requests wait, and a fifth may run already
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
    """A `FailingModel` fails in every step as long as `is_failing` is set."""

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
            with pytest.raises(EngineFailed, match=r"request failed; the server's log says more\.$"):
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
            with pytest.raises(EngineFailed, match=r"request failed: no shard answered\.$"):
                run_one(engine, [1, 2])
            assert engine.is_healthy
        assert engine.stats().num_failed_steps == 4
        model.is_failing = False
        assert run_one(engine, [1, 2]) == model.naive_greedy([1, 2], 20)


class PoisonedModel(TinyModel):
    """A `PoisonedModel` returns NaN as logits after the token 7."""

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
