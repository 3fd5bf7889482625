"""A `Recorder` records which experts are picked; the engine passes the picks to a thread that writes a file."""

from __future__ import annotations

import contextlib
import os
import queue
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cluster.trace import batch_line, header

MAX_QUEUED = 1024  # most layer calls that wait to be written; further calls are dropped and counted
MAX_BYTES, MAX_SECONDS = 1 << 30, 3600.0  # largest bounds that a client may set, in bytes and in seconds
Picks = NDArray[np.integer]


def traces_folder() -> Path:
    """Return the folder into which recordings are written; clients cannot choose another folder."""
    return Path(os.environ.get("EXPERTMESH_TRACES", Path(tempfile.gettempdir()) / "expertmesh-traces"))


@dataclass(frozen=True)
class Bounds:
    """A `Bounds` limits a recording, which ends by itself after `max_bytes` bytes or `max_seconds` seconds."""

    max_bytes: int = 64 << 20
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.max_bytes <= MAX_BYTES:
            raise ValueError(f"max_bytes is {self.max_bytes}; it must be from 1 to {MAX_BYTES}.")
        if not 0 < self.max_seconds <= MAX_SECONDS:
            raise ValueError(f"max_seconds is {self.max_seconds}; it must be above 0, and at most {MAX_SECONDS:.0f}.")


class _Recording:
    """A `_Recording` has a file, a queue of layer calls, and a thread that writes the layer calls to the file."""

    def __init__(self, path: Path, file: IO[str], bounds: Bounds) -> None:
        self.path, self.file, self.bounds = path, file, bounds
        self.started = time.monotonic()
        self.calls: queue.Queue[tuple[float, int, Picks] | None] = queue.Queue(MAX_QUEUED)
        self.num_bytes = self.num_calls = self.num_dropped = 0
        self.why_ended = ""
        self.writer = threading.Thread(target=self._write, name="trace", daemon=True)

    def start(self, first_line: str) -> None:
        """Write the first line of the file and start the thread that writes the layer calls."""
        self._put(first_line)
        self.writer.start()

    def _write(self) -> None:
        with self.file:
            while not self.why_ended:
                left = self.bounds.max_seconds - (time.monotonic() - self.started)
                try:
                    if left <= 0:
                        raise queue.Empty
                    call = self.calls.get(timeout=left)
                except queue.Empty:
                    self.why_ended = f"its {self.bounds.max_seconds:g} s are over"
                    return
                if call is None:
                    self.why_ended = "it was stopped"
                    return
                line = batch_line(*call)
                if self.num_bytes + len(line) > self.bounds.max_bytes:
                    self.why_ended = f"its {self.bounds.max_bytes} bytes are full"
                    return
                self._put(line)
                self.num_calls += 1

    def _put(self, line: str) -> None:
        try:
            self.file.write(line)
        except OSError as error:  # for example a full disk, which must not stop the engine
            self.why_ended = f"it could not be written: {error.strerror}"
        self.num_bytes += len(line)


class Recorder:
    """A `Recorder` records the experts that layer calls pick; only one recording runs at a time.

    The engine's thread calls `add`, and another thread calls the other methods. The file's header holds `model`, the
    digest of the checkpoint, and `num_experts`, the number of experts by layer.
    """

    def __init__(self, model: str, num_experts: Mapping[int, int]) -> None:
        self._model, self._num_experts = model, dict(num_experts)
        self._recording: _Recording | None = None

    def add(self, layer: int, picks_NK: Picks) -> None:
        """Queue one layer call for the file if a recording is running; drop the layer call if the queue is full."""
        recording = self._recording
        if recording is not None and not recording.why_ended:
            try:
                recording.calls.put_nowait((time.monotonic() - recording.started, layer, picks_NK.copy()))
            except queue.Full:
                recording.num_dropped += 1

    def start(self, bounds: Bounds = Bounds()) -> dict[str, Any]:
        """Start a recording unless a recording is running already; return the report of the running recording."""
        if self._recording is not None and not self._recording.why_ended:
            return self.report()
        folder = traces_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 10**6}.jsonl"
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8")
        recording = _Recording(path, file, bounds)
        recording.start(header(self._model, time.time(), self._num_experts))
        self._recording = recording
        return self.report()

    def stop(self) -> dict[str, Any]:
        """End the running recording, if any; wait until its layer calls are written, and return its report."""
        recording = self._recording
        if recording is not None:
            while recording.writer.is_alive():
                with contextlib.suppress(queue.Full):  # the queue is full; the writer soon removes a call
                    recording.calls.put(None, timeout=0.05)
                recording.writer.join(1.0)
        return self.report()

    def report(self) -> dict[str, Any]:
        """Return the path, the state and the counts of the last recording."""
        recording = self._recording
        if recording is None:
            return {"is_recording": False, "path": None}
        return {
            "is_recording": not recording.why_ended,
            "why_ended": recording.why_ended,
            "path": str(recording.path),
            "num_bytes": recording.num_bytes,
            "num_calls": recording.num_calls,
            "num_dropped": recording.num_dropped,
        }
