from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from services.cli.drill import local_shard
from tests.services.expert.checkpoint import write_checkpoint
from tests.services.expert.shard_process import ShardProcess


def kill(shard_id: str, endpoint: str) -> None:
    """Kill the process of a shard as `expertmesh drill` does: find the process, then send it SIGKILL."""
    os.kill(asyncio.run(local_shard.local_pid(shard_id, endpoint)), signal.SIGKILL)


def test_a_shard_of_this_machine_is_killed(tmp_path: Path) -> None:
    with ShardProcess(write_checkpoint(tmp_path)) as process:
        [shard] = process.shards
        assert asyncio.run(local_shard.local_pid(shard.id, shard.endpoint)) == process.process.pid
        kill(shard.id, shard.endpoint)
        process.process.join(10)
        assert process.process.exitcode == -signal.SIGKILL
        with pytest.raises(ValueError, match=f"the shard {shard.id} does not answer"):
            kill(shard.id, shard.endpoint)


def test_a_shard_elsewhere_is_left_alone() -> None:
    with pytest.raises(ValueError, match=r"the shard s is at 192\.0\.2\.1:1, on another machine; run the drill there"):
        kill("s", "192.0.2.1:1")


def test_a_process_that_does_not_listen_there_is_not_the_shard() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert local_shard._listens(os.getpid(), port)
        assert not local_shard._listens(os.getppid(), port)
    assert not local_shard._listens(os.getpid(), port)
