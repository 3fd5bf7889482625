"""The functions in this module read the processes of this machine from Linux's /proc."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path


def command_of(pid: int) -> str:
    """Return the command line of the process `pid`, or an empty string if the process does not exist."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def descendants(pid: int) -> dict[int, str]:
    """Return a dict from process id to command line, with all processes that `pid` started directly or indirectly."""
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, file.read_text().split())
    found = {child: command_of(child) for child in children}
    for child in children:
        found |= descendants(child)
    return found


def wait_until_gone(pids: Collection[int], timeout_s: float) -> dict[int, str]:
    """Wait up to `timeout_s` seconds until the processes `pids` have ended.

    Return a dict from process id to command line, with the processes that still run. A zombie counts as ended.
    """
    stop_at = time.monotonic() + timeout_s
    while (left := {pid: command_of(pid) for pid in pids if command_of(pid)}) and time.monotonic() < stop_at:
        time.sleep(0.1)
    return left
