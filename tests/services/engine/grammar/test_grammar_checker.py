from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.engine.grammar.grammar_checker import NUM_PROCESSES, GrammarChecker, _CheckerProcess
from tests.services.demo import MODEL

MAX_SECONDS = 1.5
FINE = Grammar(GrammarKind.REGEX, "[0-9]+")


def slow(salt: int = 0) -> Grammar:
    """Return a grammar of a thousand characters whose compilation would take minutes and gigabytes of memory."""
    terms = " & ".join(f"/(?s:.*)a.{{{n + salt}}}(?s:.*)/" for n in range(40))
    return Grammar(GrammarKind.LARK, f"start: T\nT: {terms}")


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(MODEL, MAX_SECONDS)
    yield made
    made.close()


def test_it_says_what_the_compiler_says(checker: GrammarChecker) -> None:
    for _ in range(2):
        checker.check(FINE)
        with pytest.raises(ValueError, match=r"^regex cannot be used: unclosed group\.$"):
            checker.check(Grammar(GrammarKind.REGEX, "(a"))


def test_a_grammar_that_takes_too_long_is_refused_in_time_and_in_one_sentence(checker: GrammarChecker) -> None:
    checker.check(FINE)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^grammar cannot be used: it takes more than the 1\.5 s and 1024 MiB that"):
        checker.check(slow())
    assert time.monotonic() - start < MAX_SECONDS + 10
    checker.check(Grammar(GrammarKind.REGEX, "after it"))


def test_what_has_passed_passes_while_slow_ones_take_every_process(checker: GrammarChecker) -> None:
    checker.check(FINE)
    refused: list[ValueError] = []

    def try_slow(salt: int) -> None:
        try:
            checker.check(slow(salt))
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=try_slow, args=(n,)) for n in range(NUM_PROCESSES)]
    for thread in threads:
        thread.start()
    checker.check(FINE)
    assert not refused
    for thread in threads:
        thread.join()
    assert len(refused) == NUM_PROCESSES


def test_a_process_that_died_is_replaced() -> None:
    process = _CheckerProcess(MODEL)
    assert process.check(FINE, MAX_SECONDS) == ""
    os.kill(process._child.pid, signal.SIGKILL)
    process._child.wait()
    assert not process.is_alive
    checker = GrammarChecker(MODEL)
    checker._idle.put(process)
    for n in range(2 * NUM_PROCESSES):
        checker.check(Grammar(GrammarKind.REGEX, f"a{n}"))
    checker.close()
