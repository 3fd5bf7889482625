from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.trace import batch_line, header, parse_trace, read_trace

SIZES = {1: 4, 3: 2}


def lines_of(*batches: tuple[float, int, list[list[int]]]) -> list[str]:
    return [header("digest", 1e9, SIZES), *(batch_line(at, layer, np.array(picks)) for at, layer, picks in batches)]


def test_what_was_recorded_is_read_back() -> None:
    trace = parse_trace(lines_of((0.1, 1, [[0, 3], [3, 2]]), (0.2, 3, [[1]]), (2.5, 1, [[3, 1]])), "t")
    assert (trace.model, trace.num_calls, trace.num_rows, trace.rows_per_call) == ("digest", 3, 4, 4 / 3)
    assert trace.counts[1].tolist() == [[1, 0, 1, 2], [0, 0, 0, 0], [0, 1, 0, 1]]
    assert trace.counts[3].tolist() == [[0, 1], [0, 0], [0, 0]]
    loads = trace.loads()
    np.testing.assert_allclose(loads[1].long_E, [1 / 3, 1 / 3, 1 / 3, 1.0], rtol=0.02)
    balance = trace.balancedness({1: (("a",), ("a",), ("b",), ("b", "c")), 3: (("a", "b", "c"),) * 2})
    assert balance == pytest.approx({1: 1.0, 3: 1.0})  # In layer 1, each of the shards a, b and c has 2 of 6 picks.


def test_a_line_that_was_cut_off_is_passed_over() -> None:
    lines = [*lines_of((0.1, 1, [[0]])), '{"at":0.2,"layer":1,"pi']
    assert parse_trace(lines, "t").num_calls == 1


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "The file t is no trace: its first line must be the header of a trace of version 1."),
        (['{"format": "other", "version": 1}\n'], "The file t is no trace"),
        (["[]\n"], "The file t is no trace"),
        (lines_of(), "The trace t holds no calls; record one while requests are answered."),
        ([*lines_of((0.1, 1, [[0]])), "{}\n"], "Line 3 of the trace t is not a call: it needs at, layer and picks"),
        (lines_of((0.1, 3, [[2]])), "Line 2 of the trace t picks an expert of layer 3 that the header does not list."),
        (lines_of((0.1, 2, [[0]])), "Line 2 of the trace t picks an expert of layer 2 "),
    ],
)
def test_what_is_no_trace_is_one_sentence(lines: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + sentence.replace(".", r"\.")):
        parse_trace(lines, "t")


def test_a_file_that_is_not_there_or_not_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_trace(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="is no trace: it is not UTF-8 text"):
        read_trace(tmp_path / "bytes")
