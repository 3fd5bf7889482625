"""These functions look at the processes of this machine, as the Linux kernel lists them in /proc."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path


def command_of(pid: int) -> str:
    """Return the command line of a process, which is empty if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of the children of `pid`, of their children and so on, by process id."""
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, file.read_text().split())
    found = {child: command_of(child) for child in children}
    for child in children:
        found |= descendants(child)
    return found


def wait_until_gone(pids: Collection[int], timeout_s: float) -> dict[int, str]:
    """Return the processes of `pids` that still run after `timeout_s`; a zombie counts as gone."""
    stop_at = time.monotonic() + timeout_s
    while (left := {pid: command_of(pid) for pid in pids if command_of(pid)}) and time.monotonic() < stop_at:
        time.sleep(0.1)
    return left
