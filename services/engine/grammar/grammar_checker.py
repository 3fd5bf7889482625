"""A `GrammarChecker` checks grammars in other processes, with bounds on time and memory, so that none can do harm.

The cost of a grammar cannot be told from its text. Intersected expressions of a few hundred characters take minutes and
tens of gigabytes, and the library checks its own limits too rarely to prevent that. So `GrammarChecker.check` hands a
grammar to a process. `check` ends the process when the time is over, and the process ends itself when its memory is
used up. A grammar that passes the check takes no longer to compile in a backbone.

    python -m services.engine.grammar.grammar_checker MODEL    # runs such a process: a line of JSON in, a line out
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.engine.grammar.compiled_grammar import COMPILE_STACK, GrammarCompiler, parameter_name

MAX_SECONDS = 5.0  # seconds for one grammar
MAX_BYTES = 1 << 30  # bytes that a process may take beside its tokenizer
START_SECONDS = 60.0  # seconds for a process to start: a large tokenizer takes seconds to load
NUM_PROCESSES = 2
MAX_KNOWN = 4096  # grammars that have passed and are remembered


class GrammarChecker:
    """A `GrammarChecker` checks grammars for the model directory `model`; any thread may call `check`.

    The processes start with the first grammars.
    """

    def __init__(self, model: str | Path, max_seconds: float = MAX_SECONDS) -> None:
        self._model, self._max_seconds = Path(model), max_seconds
        self._idle: queue.SimpleQueue[_CheckerProcess | None] = queue.SimpleQueue()
        for _ in range(NUM_PROCESSES):
            self._idle.put(None)
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Raise ValueError for a grammar that cannot be used, or that takes too much time or memory."""
        digest = hashlib.sha256(f"{grammar.kind}:{grammar.text}".encode()).digest()
        with self._lock:
            if digest in self._known:
                self._known.move_to_end(digest)
                return
        process = self._idle.get()
        try:
            if process is not None and not process.is_alive:
                process.end()
                process = None
            process = process or _CheckerProcess(self._model)
            error = process.check(grammar, self._max_seconds)
        finally:
            self._idle.put(process)
        if error:
            raise ValueError(error)
        with self._lock:
            self._known[digest] = None
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    def close(self) -> None:
        """End the idle processes; no check may follow."""
        with suppress(queue.Empty):
            while True:
                if process := self._idle.get_nowait():
                    process.end()


class _CheckerProcess:
    """A `_CheckerProcess` is a child process that checks one grammar at a time."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "services.engine.grammar.grammar_checker", str(model)]
        path = os.pathsep.join(filter(None, sys.path))
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the library writes there when it dies for lack of memory
            env=os.environ | {"PYTHONPATH": path},
        )
        if self._answer(START_SECONDS) is None:
            self.end()
            raise EngineFailed("The process that checks grammars does not start; the server's log says more.")

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def check(self, grammar: Grammar, seconds: float) -> str:
        """Return what is wrong with a grammar, or an empty string; end the process if it gives no answer in time."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps([grammar.kind, grammar.text]).encode() + b"\n")
            self._child.stdin.flush()
            if (answer := self._answer(seconds)) is not None:
                return answer
        self.end()
        return (
            f"{parameter_name(grammar.kind)} cannot be used: it takes more than the {seconds:g} s and "
            f"{MAX_BYTES >> 20} MiB that a grammar may take; use fewer or simpler rules."
        )

    def _answer(self, seconds: float) -> str | None:
        """Return the next line of the process, or None if none comes within `seconds`."""
        assert self._child.stdout is not None
        can_read, _, _ = select.select([self._child.stdout], [], [], seconds)
        line = self._child.stdout.readline() if can_read else b""
        return json.loads(line) if line else None

    def end(self) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


def main(model: str) -> None:
    """Check the grammars on the standard input one by one, and write what is wrong with each to the standard output."""
    compiler = GrammarCompiler(model)
    with suppress(ValueError):  # the model has no tokenizer, which the answer to each grammar will say
        compiler.check(Grammar(GrammarKind.REGEX, "a"))  # loads the tokenizer
    _limit_memory(MAX_BYTES + COMPILE_STACK)
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        kind, text = json.loads(line)
        signal.alarm(int(MAX_SECONDS) + 1)  # ends the process if its parent, which should end it, is gone
        try:
            compiler.check(Grammar(GrammarKind(kind), text))
            error = ""
        except ValueError as wrong:
            error = str(wrong)
        signal.alarm(0)
        print(json.dumps(error), flush=True)


def _limit_memory(more: int) -> None:
    """Allow the process `more` bytes beyond what it uses now; do nothing where /proc does not say how much this is."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, most))


if __name__ == "__main__":
    main(sys.argv[1])
