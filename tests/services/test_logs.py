"""These tests check that every log record becomes one line of JSON."""

from __future__ import annotations

import json
import logging
import sys

from services.logs import REQUESTS, JsonLines


def line_of(name: str, message: str, *args: object, **extra: object) -> dict[str, object]:
    record = logging.LogRecord(name, logging.WARNING, "file.py", 1, message, args, None)
    vars(record).update(extra)
    line = JsonLines("backbone").format(record)
    assert "\n" not in line
    fields: dict[str, object] = json.loads(line)
    return fields


def test_a_record_is_one_json_object_with_the_request_it_belongs_to() -> None:
    fields = line_of("services.engine", "A %s\nof two lines", "message", request_id="r-1")
    assert (fields["message"], fields["level"], fields["process"]) == ("A message\nof two lines", "WARNING", "backbone")
    assert fields["request_id"] == "r-1"
    assert str(fields["time"]).endswith("+00:00")
    assert "request_id" not in line_of("services.engine", "Nothing in particular")
    fields = line_of("services.engine", "It ended.", request_id="r-2", first_token_s=0.02)
    assert (fields["request_id"], fields["first_token_s"]) == ("r-2", 0.02)
    assert fields.keys() == {"time", "level", "logger", "process", "pid", "request_id", "first_token_s", "message"}


def test_the_log_of_requests_keeps_its_fields() -> None:
    fields = line_of(REQUESTS, "%s", json.dumps({"request_id": "r-3", "num_generated": 5}))
    assert (fields["request_id"], fields["num_generated"]) == ("r-3", 5)
    assert "message" not in fields


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        fields = line_of("services", "It failed.", exc_info=sys.exc_info())
    assert str(fields["traceback"]).startswith("Traceback (most recent call last):\n")
    assert str(fields["traceback"]).endswith("\nValueError: no")
