from __future__ import annotations

import stat
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.trace import read_trace
from services.engine.recorder import Bounds, Recorder


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setenv("EXPERTMESH_TRACES", str(tmp_path / "traces"))
    return Recorder("digest", {2: 8})


def ended(recorder: Recorder) -> bool:
    stop_at = time.monotonic() + 60
    while recorder.report()["is_recording"] and time.monotonic() < stop_at:
        time.sleep(0.01)
    return not recorder.report()["is_recording"]


def test_what_is_picked_between_start_and_stop_is_in_the_file(recorder: Recorder) -> None:
    picks = np.array([[1, 2]])
    recorder.add(2, picks)
    path = Path(recorder.start()["path"])
    assert recorder.start()["path"] == str(path)  # `start` returns the recording that is running already
    recorder.add(2, picks)
    picks[:] = 7  # the recording has a copy, so the engine may overwrite the array
    recorder.add(2, picks)
    report = recorder.stop()
    recorder.add(2, picks)
    assert (report["num_calls"], report["num_dropped"], report["why_ended"]) == (2, 0, "it was stopped")
    assert read_trace(path).counts[2].sum(axis=0).tolist() == [0, 1, 1, 0, 0, 0, 0, 2]
    assert report["num_bytes"] == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert recorder.stop() == report
    assert recorder.start()["path"] != str(path)
    recorder.stop()


def test_it_ends_by_itself_when_its_bytes_are_full(recorder: Recorder) -> None:
    path = Path(recorder.start(Bounds(max_bytes=1000))["path"])
    for _ in range(100):
        recorder.add(2, np.zeros((4, 2), np.int64))
    assert ended(recorder)
    assert recorder.report()["why_ended"] == "its 1000 bytes are full"
    assert 900 < path.stat().st_size <= 1000
    assert read_trace(path).num_calls == recorder.stop()["num_calls"]


@pytest.mark.parametrize("is_busy", [False, True])
def test_it_ends_by_itself_when_its_time_is_over(recorder: Recorder, is_busy: bool) -> None:
    recorder.start(Bounds(max_seconds=0.2))
    stop_at = time.monotonic() + 60
    while recorder.report()["is_recording"] and time.monotonic() < stop_at:
        if is_busy:
            recorder.add(2, np.zeros((1, 1), np.int64))
        time.sleep(0.001)
    assert recorder.report()["why_ended"] == "its 0.2 s are over"


def test_before_anything_was_recorded_there_is_nothing_to_stop(recorder: Recorder) -> None:
    assert recorder.stop() == {"is_recording": False, "path": None}


@pytest.mark.parametrize("bounds", [{"max_bytes": 0}, {"max_bytes": 1 << 31}, {"max_seconds": 0}, {"max_seconds": 1e9}])
def test_bounds_have_bounds(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be "):
        Bounds(**bounds)  # type: ignore[arg-type]
