"""A `GrammarChecker` checks grammars before their requests are accepted, with limits on time, memory and number.

A backbone takes no longer to compile a grammar than the check of the grammar took.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path

from services.engine.contract.errors import EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar
from services.engine.grammar.checker_process import MAX_BYTES, CheckerProcess, Failure
from services.engine.grammar.compiled_grammar import parameter_name
from services.engine.grammar.lane import Lane

MAX_SECONDS = 5.0  # largest number of seconds of computing to check one grammar
QUICK_SECONDS = 0.05  # seconds after which a check leaves the quick lane; small grammars take milliseconds
# Seconds after which a check leaves the fast lane for the slow lane. Almost all grammars take a tenth of this time.
FAST_SECONDS = 0.25
NUM_FAST = 2  # grammars that are checked at the same time in the quick lane, and as many again in the fast lane
MAX_SLOW = 8  # grammars that are checked or wait in the slow lane, which checks one at a time
MAX_KNOWN = 4096  # number of grammars whose result is remembered


class GrammarChecker:
    """A `GrammarChecker` checks grammars for the model directory `model`; any thread may call `check`.

    There are three lanes, so that slow grammars delay only slow grammars. Every grammar is first checked in the quick
    lane, which gives it `QUICK_SECONDS`. If this time is too short, the check begins again in the fast lane, which
    gives it `FAST_SECONDS`, and at last in the slow lane. The first call of `check` starts the process that checks; the
    constructor starts no process.
    """

    def __init__(self, model: str | Path, max_seconds: float = MAX_SECONDS) -> None:
        self._model, self._max_seconds = Path(model), max_seconds
        self._early_lanes = [Lane(NUM_FAST, min(seconds, max_seconds)) for seconds in (QUICK_SECONDS, FAST_SECONDS)]
        self._slow = Lane(1, max_seconds)
        self._slow_places = threading.BoundedSemaphore(MAX_SLOW)
        self.process: CheckerProcess | None = None
        self._starting = threading.Lock()
        # Results by digest: "" for grammars that passed, and a sentence for grammars that took too much time or
        # memory. Grammars with other mistakes are not remembered, because the mistakes are found quickly.
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Raise ValueError if a grammar cannot be used, or if compiling the grammar takes too much time or memory.

        Raises EngineOverloaded if too many slow grammars wait.
        """
        digest = hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode()).digest()
        with self._lock:
            known = self._known.get(digest)
            if known is not None:
                self._known.move_to_end(digest)
        error = self._check(grammar, digest) if known is None else known
        if error:
            raise ValueError(error)

    def _check(self, grammar: Grammar, digest: bytes) -> str:
        answer: str | Failure = Failure.TIME
        for lane in self._early_lanes:
            if answer is Failure.TIME:
                answer = self._ask(grammar, lane)
        if answer is Failure.TIME:
            answer = self._check_slowly(grammar)
        if isinstance(answer, Failure):
            answer = (
                f"{parameter_name(grammar.kind)} cannot be used: it takes more than the {self._max_seconds:g} s and "
                f"{MAX_BYTES >> 20} MiB that a grammar may take; use fewer or simpler rules."
            )
        elif answer:
            return answer
        with self._lock:
            self._known[digest] = answer
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return answer

    def _check_slowly(self, grammar: Grammar) -> str | Failure:
        if not self._slow_places.acquire(blocking=False):
            sentence = f"{MAX_SLOW} grammars that take long to check are waiting, which is the most; try again later."
            raise EngineOverloaded(sentence, retry_after=int(self._max_seconds))
        try:
            return self._ask(grammar, self._slow)
        finally:
            self._slow_places.release()

    def _ask(self, grammar: Grammar, lane: Lane) -> str | Failure:
        with lane.place(len(grammar.text)):
            try:
                return self._living_process().check(grammar, lane.seconds)
            except EngineFailed:  # the process died, for example because the machine ran out of memory
                return self._living_process().check(grammar, lane.seconds)

    def _living_process(self) -> CheckerProcess:
        with self._starting:
            if self.process is not None and not self.process.is_alive:
                self.process.end()
                self.process = None
            self.process = self.process or CheckerProcess(self._model)
            return self.process

    def close(self) -> None:
        """End the process; `check` must not be called after `close`."""
        if self.process is not None:
            self.process.end()
