"""A `CheckerProcess` is a child process that checks grammars, each in a process of its own with limited resources.

The text of a grammar does not show how costly the grammar is. Intersected expressions of a few hundred characters take
minutes and tens of gigabytes, and the library checks its own limits too rarely to prevent this cost. So each check runs
in a process that the operating system ends after a number of seconds of computing. The child process loads the
tokenizer once and forks for each grammar, which takes milliseconds.

    python -m services.engine.grammar.checker_process MODEL    # runs the child process: JSON lines in and out
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from enum import StrEnum
from itertools import count
from pathlib import Path

from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.engine.grammar.compiled_grammar import COMPILE_STACK, GrammarCompiler

MAX_BYTES = 1 << 30  # bytes that the check of one grammar may use in addition to the tokenizer
# Seconds for the child process to start: loading a large tokenizer takes seconds.
START_SECONDS = 60.0
# A check that may take longer than this lets the engine's steps and all quicker checks go first.
POLITE_SECONDS, NICENESS = 0.1, 10
MAX_SENTENCE = 800  # characters of an error; one line must fit in one write to a pipe, which has 4,096 bytes


class Failure(StrEnum):
    """A `Failure` says why the check of a grammar ended without a result."""

    TIME = "time"
    MEMORY = "memory"


class CheckerProcess:
    """A `CheckerProcess` checks grammars for the model directory `model`; any thread may call `check`.

    The constructor starts the process, and raises EngineFailed if the process does not start.
    """

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "services.engine.grammar.checker_process", str(model)]
        path = os.pathsep.join(filter(None, sys.path))
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the library writes to stderr when it runs out of memory
            # The library must not start threads, because the process forks.
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
        )
        self._lock, self._numbers = threading.Lock(), count(1)
        self._pending: dict[int, Future[str | Failure]] = {}
        self._is_open = True
        ready = self._expect(0)
        self._reader = threading.Thread(target=self._read, name="grammar-answers", daemon=True)
        self._reader.start()
        try:
            ready.result(START_SECONDS)
        except (TimeoutError, EngineFailed) as error:
            self.end()
            raise EngineFailed("The process that checks grammars does not start.") from error

    @property
    def is_alive(self) -> bool:
        return self._is_open and self._child.poll() is None

    @property
    def pid(self) -> int:
        return self._child.pid

    def check(self, grammar: Grammar, seconds: float) -> str | Failure:
        """Return one sentence about what is wrong with `grammar`, "" if nothing is, or why the check did not end.

        The check may take `seconds` seconds of processor time. Raises EngineFailed if the child process ends.
        """
        number = next(self._numbers)
        answer = self._expect(number)
        line = json.dumps([number, grammar.kind, grammar.text, seconds]).encode() + b"\n"
        with self._lock, suppress(OSError):  # if the process has died, `_read` makes `answer` raise
            assert self._child.stdin is not None
            self._child.stdin.write(line)
            self._child.stdin.flush()
        return answer.result()

    def _expect(self, number: int) -> Future[str | Failure]:
        answer: Future[str | Failure] = Future()
        with self._lock:
            self._pending[number] = answer
            is_open = self._is_open
        if not is_open:
            self._fail_all()
        return answer

    def _read(self) -> None:
        """Pass the answers of the process on to the callers of `check` until the process ends."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            number, error, failure = json.loads(line)
            with self._lock:
                answer = self._pending.pop(number)
            answer.set_result(Failure(failure) if failure else error)
        self._child.stdout.close()
        with self._lock:
            self._is_open = False
        self._fail_all()

    def _fail_all(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer.set_exception(EngineFailed("The process that checks grammars ended."))

    def end(self) -> None:
        self._child.kill()
        self._child.wait()
        self._reader.join()
        if self._child.stdin is not None:
            with suppress(BrokenPipeError):
                self._child.stdin.close()


class _Forks:
    """A `_Forks` runs in the child process, and checks each grammar in a fork of the process."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler, self._selector = compiler, selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def run(self) -> None:
        """Check the grammars that standard input holds, one per line, until standard input ends."""
        text = b""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._reap(key.fd, *key.data)
                    continue
                received = os.read(key.fd, 1 << 16)
                if not received:
                    return
                *lines, text = (text + received).split(b"\n")
                for line in lines:
                    self._start(*json.loads(line))

    def _start(self, number: int, kind: str, text: str, seconds: float) -> None:
        pid = os.fork()
        if pid == 0:
            self._check(number, Grammar(GrammarKind(kind), text), seconds)
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, number))

    def _check(self, number: int, grammar: Grammar, seconds: float) -> None:
        """Check one grammar, print the answer and end this process."""
        code = 1
        try:
            if seconds > POLITE_SECONDS:
                os.nice(NICENESS)
            _limit_memory(MAX_BYTES + COMPILE_STACK)
            # The limit is on processor time, so a busy machine refuses no grammar. The alarm ends a process that hangs.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.alarm(int(20 * seconds) + 60)
            try:
                self._compiler.check(grammar)
                error = ""
            except ValueError as wrong:
                error = str(wrong)[:MAX_SENTENCE]
            _answer(number, error, None)
            code = 0
        finally:
            os._exit(code)

    def _reap(self, pidfd: int, pid: int, number: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        if status:
            is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
            _answer(number, "", Failure.TIME if is_late else Failure.MEMORY)


def _answer(number: int, error: str, failure: Failure | None) -> None:
    os.write(sys.stdout.fileno(), json.dumps([number, error, failure]).encode() + b"\n")


def main(model: str) -> None:
    """Load the tokenizer of `model`, say that the process is ready, and check grammars."""
    compiler = GrammarCompiler(model)
    with suppress(ValueError):  # without a tokenizer, every check fails later with a message
        compiler.check(Grammar(GrammarKind.REGEX, "a"))  # loads the tokenizer
    _answer(0, "", None)
    _Forks(compiler).run()


def _limit_memory(more: int) -> None:
    """Let this process take at most `more` additional bytes of memory; do nothing if there is no /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, most))


if __name__ == "__main__":
    main(sys.argv[1])
