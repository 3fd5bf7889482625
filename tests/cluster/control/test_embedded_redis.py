from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from cluster.control import embedded_redis
from cluster.control.embedded_redis import EmbeddedRedis, find_server


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # The process may end between opening and reading.
        return False


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def test_it_serves_until_it_is_stopped() -> None:
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        assert client.get("key") == b"value"
        assert client.config_get("save")["save"] == ""
        assert is_running(server.pid)
    assert wait_until_gone(server.pid)
    server.stop()


def test_a_server_that_dies_comes_back_empty_where_it_was() -> None:
    with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        for _ in range(2):
            dead = server.pid
            os.kill(dead, signal.SIGKILL)
            stop_at = time.monotonic() + 60
            while time.monotonic() < stop_at:
                try:
                    assert client.get("key") is None
                    break
                except redis.ConnectionError:
                    time.sleep(0.02)
            assert is_running(server.pid)
            assert server.pid != dead
        last = server.pid
    assert wait_until_gone(last)


def test_two_servers_are_two() -> None:
    with EmbeddedRedis() as one, EmbeddedRedis() as two:
        assert one.pid != two.pid
        assert one.url != two.url


@pytest.mark.parametrize("stop_signal", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_does_not_outlive_its_starter(stop_signal: signal.Signals) -> None:
    start = "server = EmbeddedRedis(); print(server.pid, flush=True); input()"
    program = f"from cluster.control.embedded_redis import EmbeddedRedis; {start}"
    starter = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert is_running(pid)
        os.kill(starter.pid, stop_signal)
    assert wait_until_gone(pid)


def test_it_outlives_the_thread_that_started_it() -> None:
    servers: list[EmbeddedRedis] = []
    thread = threading.Thread(target=lambda: servers.append(EmbeddedRedis()))
    thread.start()
    thread.join()
    time.sleep(0.05)
    with servers[0], redis.Redis.from_url(servers[0].url) as client:
        assert client.ping()


def test_a_killed_server_is_stopped_without_complaint() -> None:
    server = EmbeddedRedis()
    os.kill(server.pid, signal.SIGKILL)
    assert wait_until_gone(server.pid)
    server.stop()


def test_a_server_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\necho no memory today; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_server() == fake
    with pytest.raises(RuntimeError, match=f"{fake} did not start in 5 tries: no memory today"):
        EmbeddedRedis()


def test_a_taken_port_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis() as first:
        ports = iter([first.port, embedded_redis._free_port()])
        monkeypatch.setattr(embedded_redis, "_free_port", lambda: next(ports))
        with EmbeddedRedis() as second:
            assert second.port != first.port
