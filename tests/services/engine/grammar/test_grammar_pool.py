from __future__ import annotations

import asyncio
import threading

import pytest

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.engine.grammar.grammar_pool import NUM_FAST, NUM_SLOW, SLOW_SECONDS, GrammarPool
from services.engine.grammar.waiting_grammars import SMALL_CHARS

NEVER = float("inf")


class Compiler:
    """A `Compiler` compiles a grammar at once, but a slow grammar only when the test lets it."""

    def __init__(self) -> None:
        self.may_finish = threading.Event()

    def __call__(self, grammar: Grammar) -> str:
        if grammar.text.startswith("slow"):
            assert self.may_finish.wait(60)
        if grammar.text.startswith("bad"):
            raise ValueError("regex cannot be used.")
        return grammar.text


def compiled(pool: GrammarPool, text: str, deadline: float = NEVER, retry_after: int | None = 1) -> asyncio.Task[str]:
    return asyncio.ensure_future(pool.compile(Grammar(GrammarKind.REGEX, text), deadline, retry_after))


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


def test_slow_grammars_delay_only_slow_grammars(compiler: Compiler) -> None:
    async def test() -> None:
        pool = GrammarPool(compiler, 100)
        slow = [compiled(pool, f"slow{n}") for n in range(NUM_SLOW)]
        for n in range(5 * NUM_FAST):
            assert await asyncio.wait_for(compiled(pool, f"{n}"), 30) == f"{n}"
        await asyncio.sleep(2 * SLOW_SECONDS)
        # Now the grammars are known to be slow, and wait without a place for fast ones.
        assert not any(task.done() for task in slow)
        compiler.may_finish.set()
        assert await asyncio.gather(*slow) == [f"slow{n}" for n in range(NUM_SLOW)]
        compiler.may_finish.clear()
        again = [compiled(pool, f"slow{n % NUM_SLOW}") for n in range(20)]
        assert await asyncio.wait_for(compiled(pool, "fast"), 30) == "fast"
        assert not any(task.done() for task in again)
        compiler.may_finish.set()
        await asyncio.gather(*again)
        pool.close()

    asyncio.run(test())


def test_small_grammars_are_compiled_while_large_slow_ones_hold_all_other_places(compiler: Compiler) -> None:
    async def test() -> None:
        pool = GrammarPool(compiler, 100)
        slow = [compiled(pool, f"slow{n}".ljust(SMALL_CHARS + 1)) for n in range(NUM_FAST + NUM_SLOW + 2)]
        await asyncio.sleep(3 * SLOW_SECONDS)
        large = compiled(pool, "large".ljust(SMALL_CHARS + 1))
        for n in range(5):
            assert await asyncio.wait_for(compiled(pool, f"{n}"), 30) == f"{n}"
        assert not any(task.done() for task in [*slow, large])
        compiler.may_finish.set()
        await asyncio.gather(*slow, large)
        pool.close()

    asyncio.run(test())


def test_mistakes_limits_and_deadlines(compiler: Compiler) -> None:
    async def test() -> None:
        pool = GrammarPool(compiler, 2)
        with pytest.raises(ValueError, match=r"regex cannot be used\."):
            await compiled(pool, "bad")
        slow = [compiled(pool, f"slow{n}") for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(EngineOverloaded, match="The grammars of 2 requests are being compiled") as refused:
            await compiled(pool, "a", retry_after=7)
        assert refused.value.retry_after == 7
        await asyncio.sleep(2 * SLOW_SECONDS)
        assert await asyncio.wait_for(compiled(pool, "resumed", retry_after=None), 30) == "resumed"
        late = compiled(pool, "slow", deadline=0.0, retry_after=None)
        with pytest.raises(DeadlinePassed, match="deadline passed before its grammar was compiled"):
            await late
        compiler.may_finish.set()
        await asyncio.gather(*slow)
        assert await compiled(pool, "a") == "a"
        pool.close()
        with pytest.raises(EngineFailed, match="not running"):
            await compiled(pool, "b")

    asyncio.run(test())
