from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.engine.contract.errors import EngineOverloaded
from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.engine.grammar import grammar_checker
from services.engine.grammar.grammar_checker import GrammarChecker
from tests.services.demo import MODEL

MAX_SECONDS = 0.5
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
    """Check a grammar whose compilation would take minutes, which is longer than this test may take."""
    checker.check(FINE)
    with pytest.raises(ValueError, match=r"^grammar cannot be used: it takes more than the 0\.5 s and 1024 MiB that"):
        checker.check(slow())
    checker.check(Grammar(GrammarKind.REGEX, "after it"))


def test_slow_grammars_delay_only_slow_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    max_slow = 3
    monkeypatch.setattr(grammar_checker, "MAX_SLOW", max_slow)
    checker = GrammarChecker(MODEL, MAX_SECONDS)
    checker.check(FINE)
    refused: list[Exception] = []

    def try_slow(salt: int) -> None:
        try:
            checker.check(slow(salt))
        except (ValueError, EngineOverloaded) as error:
            refused.append(error)

    threads = [threading.Thread(target=try_slow, args=(n,)) for n in range(1, max_slow + 3)]
    for thread in threads:
        thread.start()
    for n in range(5):
        checker.check(Grammar(GrammarKind.REGEX, f"quick{n}"))
    assert len(refused) < len(threads), "the slow grammars are still being checked"
    for thread in threads:
        thread.join()
    assert len(refused) == len(threads)
    late = [error for error in refused if isinstance(error, ValueError)]
    assert len(late) >= max_slow
    for error in refused:
        if isinstance(error, EngineOverloaded):
            assert str(error).startswith(f"{max_slow} grammars that take long to check are waiting")
    monkeypatch.setattr(checker, "_check", lambda *_: pytest.fail("the result was not remembered"))
    with pytest.raises(ValueError, match="it takes more than"):
        checker.check(slow(1))
    checker.close()


def test_a_slow_grammar_passes_if_it_takes_less_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker, "QUICK_SECONDS", 0.000_001)
    monkeypatch.setattr(grammar_checker, "FAST_SECONDS", 0.000_001)
    checker = GrammarChecker(MODEL)
    checker.check(FINE)
    with pytest.raises(ValueError, match="unclosed group"):
        checker.check(Grammar(GrammarKind.REGEX, "(b"))
    checker.close()


def test_a_process_that_died_is_replaced() -> None:
    checker = GrammarChecker(MODEL)
    for n in range(3):
        checker.check(Grammar(GrammarKind.REGEX, f"a{n}"))
        assert checker.process is not None
        os.kill(checker.process.pid, signal.SIGKILL)
    checker.close()


def test_a_model_without_a_tokenizer_has_no_grammars(tmp_path: Path) -> None:
    checker = GrammarChecker(tmp_path)
    with pytest.raises(ValueError, match=r"A grammar needs the tokenizer\.json of the model directory"):
        checker.check(FINE)
    checker.close()
