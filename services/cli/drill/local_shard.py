"""`local_pid` finds the process of a shard on this machine, so that a drill can kill the process.

To kill a shard on another machine, run the drill on the shard's machine.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from services.expert import control_client

LISTENING = "0A"  # the state of a listening socket in /proc/net/tcp


async def local_pid(shard_id: str, endpoint: str) -> int:
    """Return the id of the process that serves `endpoint`.

    The shard tells its process id, and the kernel must confirm that the process with this id listens on the port. The
    shard's reply alone is not enough: a forwarded port may lead to a shard on another machine, and on this machine an
    unrelated process may have the same id. Raises ValueError if the shard is on another machine or does not answer.
    """
    host, _, port = endpoint.rpartition(":")
    if not _is_here(host):
        raise ValueError(f"the shard {shard_id} is at {endpoint}, on another machine; run the drill there")
    try:
        pid = (await control_client.status(endpoint)).pid
    except control_client.ShardError as error:
        raise ValueError(f"the shard {shard_id} does not answer: {error}") from None
    if not _listens(pid, int(port)):
        what = f"the shard {shard_id} says that it is process {pid}, which does not listen on {endpoint} on this host"
        raise ValueError(f"{what}; run the drill where the shard runs, as its user, on Linux")
    return pid


def _is_here(host: str) -> bool:
    """Return True if `host` is an address of this machine.

    The function tries to bind a socket to `host`, which fails for an address of another machine.
    """
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _listens(pid: int, port: int) -> bool:
    """Return True if /proc shows that the process `pid` listens on `port`.

    Return False if the process belongs to another user, because its sockets cannot be read.
    """
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    held = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                held.add(os.readlink(descriptor))
    return bool(inodes & held)
