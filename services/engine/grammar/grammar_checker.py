"""A `GrammarChecker` checks grammars in separate processes, with limits on time and memory.

The text of a grammar does not show how costly the grammar is. Intersected expressions of a few hundred characters take
minutes and tens of gigabytes, and the library checks its own limits too rarely to prevent this cost. So
`GrammarChecker.check` passes a grammar to a separate process. `check` kills the process after a time limit, and the
process ends itself when it needs too much memory. A grammar that passes the check takes no longer to compile in a
backbone.

    python -m services.engine.grammar.grammar_checker MODEL    # runs such a process: JSON lines in and out
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

MAX_SECONDS = 5.0  # largest number of seconds to check one grammar
MAX_BYTES = 1 << 30  # bytes that a process may use in addition to its tokenizer
START_SECONDS = 60.0  # largest number of seconds for a process to start: loading a large tokenizer takes seconds
NUM_PROCESSES = 2
MAX_KNOWN = 4096  # number of grammars that passed the check and are remembered


class GrammarChecker:
    """A `GrammarChecker` checks grammars for the model directory `model`; any thread may call `check`.

    The first calls of `check` start the processes; the constructor starts no process.
    """

    def __init__(self, model: str | Path, max_seconds: float = MAX_SECONDS) -> None:
        self._model, self._max_seconds = Path(model), max_seconds
        self._idle: queue.SimpleQueue[_CheckerProcess | None] = queue.SimpleQueue()
        for _ in range(NUM_PROCESSES):
            self._idle.put(None)
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Raise ValueError if a grammar cannot be used, or if compiling the grammar takes too much time or memory."""
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
        """End the idle processes; `check` must not be called after `close`."""
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
            stderr=subprocess.DEVNULL,  # the library writes to stderr when it runs out of memory
            env=os.environ | {"PYTHONPATH": path},
        )
        if self._answer(START_SECONDS) is None:
            self.end()
            raise EngineFailed("The process that checks grammars does not start; the server's log says more.")

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def check(self, grammar: Grammar, seconds: float) -> str:
        """Return a sentence that says what is wrong with a grammar, or "" if the grammar can be used.

        End the process if it does not answer within `seconds`.
        """
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
        """Return the next answer of the process, or None if there is no answer within `seconds`."""
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
    """Check the grammars that standard input holds, one per line, and print one answer per grammar.

    An answer is a JSON string that says what is wrong with the grammar, or an empty JSON string.
    """
    compiler = GrammarCompiler(model)
    with suppress(ValueError):  # without a tokenizer, every check fails later with a message
        compiler.check(Grammar(GrammarKind.REGEX, "a"))  # loads the tokenizer
    _limit_memory(MAX_BYTES + COMPILE_STACK)
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        kind, text = json.loads(line)
        signal.alarm(int(MAX_SECONDS) + 1)  # end this process even if the parent process has died
        try:
            compiler.check(Grammar(GrammarKind(kind), text))
            error = ""
        except ValueError as wrong:
            error = str(wrong)
        signal.alarm(0)
        print(json.dumps(error), flush=True)


def _limit_memory(more: int) -> None:
    """Let this process take at most `more` additional bytes of memory; do nothing if there is no /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, most))


if __name__ == "__main__":
    main(sys.argv[1])
