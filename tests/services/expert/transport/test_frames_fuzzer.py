"""The test checks every input that the fuzzer has found to reach new code of our HTTP/2."""

from __future__ import annotations

from tests.services.expert.transport.frames_fuzzer import check, corpus


def test_bytes_of_the_fuzzer_are_handled_well_and_the_same_however_they_are_cut() -> None:
    inputs = corpus()
    assert len(inputs) > 50
    for data in inputs:
        check(data)
