"""Every Expertmesh process logs to its standard error, one JSON object per line; Ray keeps a file for each process."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["json", "text"]
OURS = ("model", "cluster", "services", "expertmesh")
REQUESTS = "expertmesh.requests"  # the logger whose messages are JSON objects themselves
USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # the attributes that every record has
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """A `JsonLines` formatter turns a log record into one line of JSON.

    The fields are the time (UTC), the level, the logger, the name and the id of the process, everything that the caller
    passed as `extra` (such as `request_id`), the message, and the traceback if there is one.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self.process,
            "pid": os.getpid(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in USUAL}
        if record.name == REQUESTS:
            fields |= json.loads(record.getMessage())
        else:
            fields["message"] = record.getMessage()
        if record.exc_info:
            # `formatException` uses `print`, which Ray replaces by a function that splits the text into lines.
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure(process: str, log_format: LogFormat) -> None:
    """Write the log of Expertmesh's modules to standard error; `process` is this process's name, such as "backbone"."""
    handler = logging.StreamHandler(sys.__stderr__)  # not `sys.stderr`, which Serve replaces by a logger
    handler.setFormatter(JsonLines(process) if log_format == "json" else logging.Formatter(TEXT))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
