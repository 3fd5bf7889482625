"""The tests check that an engine continues an answer with the tokens that the first engine would have generated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from model.families.registry import load_family
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.contract.errors import EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar, GrammarKind, SamplingParams
from services.engine.contract.token_output import TokenLogprob, TokenOutput
from services.engine.engine import Engine
from services.engine.request import Request
from services.engine.scheduling.memory import plan_memory
from tests.services.demo import MODEL, held_out_prompts
from tests.services.engine.resumable import KINDS
from tests.services.engine.scheduling.test_scheduler import assert_nothing_is_held, commit, lens, make, request, step
from tests.services.engine.tiny_model import tiny_engine

FAMILY = load_family(MODEL)
MAX_LEN, NUM_CUTS = 256, 3
PROMPTS = [prompt[: 20 + 7 * n] for n, prompt in enumerate(held_out_prompts(4))]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    end: tuple[str | None, int, int] | None = None

    def add(self, output: TokenOutput) -> None:
        self.tokens += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.end = (output.finish_reason, output.num_prompt, output.num_generated)


def make_engine(draft_tokens: int) -> Engine:
    memory = plan_memory(FAMILY.config.state_spec, torch.float32, 64 << 20, MAX_LEN, 8)
    config = BackboneConfig(torch.float32, "cpu", MAX_LEN, 64, memory, num_threads=1, draft_tokens=draft_tokens)
    return Backbone(config, FAMILY, None, None).engine


@pytest.fixture(scope="module", params=[0, 3], ids=["without drafts", "with drafts"])
def engine(request: Any) -> Iterator[Engine]:
    """Start the engine that continues the answers of the engine `first`."""
    made = make_engine(request.param)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def first() -> Iterator[Engine]:
    """Start the engine that generates the beginnings of the answers."""
    made = make_engine(3)
    made.start()
    yield made
    made.stop()


async def ask(
    engine: Engine, name: str, prompt: Sequence[int], params: SamplingParams, sent: Sequence[int] | None = None
) -> Answer:
    answer = Answer()
    async for output in engine.generate(name, prompt, params, sent_token_ids=sent):
        answer.add(output)
    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_is_what_would_have_followed(first: Engine, engine: Engine, kind: str) -> None:
    params, chooser = KINDS[kind], random.Random(kind)

    async def run() -> None:
        wholes = await asyncio.gather(*(ask(first, f"{n}", prompt, params) for n, prompt in enumerate(PROMPTS)))
        trials = [
            (n, cut)
            for n, whole in enumerate(wholes)
            for cut in {0, 1, len(whole.tokens) - 1, *chooser.choices(range(1, len(whole.tokens)), k=NUM_CUTS)}
        ]
        rests = await asyncio.gather(
            *(
                ask(engine, f"{trial}", PROMPTS[trial[0]], params, wholes[trial[0]].tokens[: trial[1]])
                for trial in trials
            )
        )
        for (n, cut), rest in zip(trials, rests, strict=True):
            whole = wholes[n]
            assert rest.tokens == whole.tokens[cut:], (n, cut)
            assert rest.logprobs == whole.logprobs[cut:]
            assert rest.prompt_logprobs == (() if cut else whole.prompt_logprobs)
            assert rest.end == whole.end

    asyncio.run(run())


def test_the_test_above_would_see_what_is_forgotten(engine: Engine) -> None:
    """Check that the previous test can fail.

    This test wrongly sends the earlier tokens as part of the prompt. So penalties, length limits and the grammar start
    again after the earlier tokens, and the answer must differ.
    """

    async def run(kind: str) -> bool:
        whole = await ask(engine, "whole", PROMPTS[0], KINDS[kind])
        cut = len(whole.tokens) // 2
        forgetful = await ask(engine, "rest", [*PROMPTS[0], *whole.tokens[:cut]], KINDS[kind])
        return forgetful.tokens == whole.tokens[cut:]

    for kind in ("penalties", "stop ids", "schema", "regex", "greedy", "thinking", "thinking with a schema"):
        assert not asyncio.run(run(kind)), kind


def test_an_answer_without_room_for_another_token_is_refused_in_a_sentence() -> None:
    engine = tiny_engine()
    engine.start()
    with pytest.raises(EngineFailed, match="of 4 tokens leaves no room for another token here"):
        asyncio.run(ask(engine, "r", [1, 2], SamplingParams(max_tokens=4), [3, 4, 5, 6]))
    with pytest.raises(ValueError, match="sent_token_ids holds the token id 50; allowed are 0 to 49"):
        asyncio.run(ask(engine, "r", [1, 2], SamplingParams(max_tokens=4), [50]))
    engine.stop()


def resumed(name: str, num_prompt: int, num_sent: int) -> Request:
    new = request(name, num_prompt + num_sent)
    return Request(name, new.token_ids, new.params, 0, new.max_len, new.stop_ids, num_sent=num_sent)


def test_it_is_not_refused_where_new_ones_are_and_goes_before_those_that_wait() -> None:
    scheduler = make(num_slots=1, max_waiting=1)
    scheduler.add(request("runs", 3, num_answer=2))
    step(scheduler)
    scheduler.add(request("waits", 3, num_answer=1))
    with pytest.raises(EngineOverloaded):
        scheduler.add(request("new", 3))
    scheduler.add(resumed("first", 3, 2))
    scheduler.add(resumed("second", 3, 0))
    assert [waiting.id for waiting in scheduler.waiting] == ["first", "second", "waits"]
    step(scheduler)
    batch = scheduler.schedule()
    assert lens(batch) == {"first": 5}
    [output] = commit(scheduler, batch)
    assert (output.num_prompt, output.num_generated) == (3, 3)
    for name in ("first", "second", "waits"):
        scheduler.abort(name)
    assert_nothing_is_held(scheduler)


def test_one_with_a_grammar_is_not_refused_for_want_of_room_to_compile_it() -> None:
    def compile_grammar(grammar: Grammar) -> None:
        raise ValueError("grammar cannot be used.")

    params = SamplingParams(grammar=Grammar(GrammarKind.REGEX, "a"))
    engine = tiny_engine(compile_grammar=compile_grammar, max_waiting=1)
    engine.start()
    assert engine._grammar_pool
    assert engine._grammar_pool._places.acquire()
    with pytest.raises(EngineOverloaded):
        asyncio.run(ask(engine, "new", [1], params))
    for _ in range(3):  # a resumed request took no place in the pool, so it must free none
        with pytest.raises(ValueError, match="cannot be used"):
            asyncio.run(ask(engine, "old", [1], params, []))
    engine.stop()


def test_closing_it_frees_what_it_holds() -> None:
    engine = tiny_engine(has_prefix_cache=False)
    engine.start()

    async def run() -> None:
        endless = SamplingParams(temperature=0, ignore_eos=True)
        async with aclosing(engine.generate("r", [1, 2], endless, sent_token_ids=[3, 4])) as outputs:
            assert (await anext(outputs)).num_generated >= 3
            assert engine.stats().num_slots_taken == 1
        while engine.scheduler.has_work:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    assert engine.stats().num_slots_taken == engine.stats().num_blocks_taken == 0
    engine.stop()
