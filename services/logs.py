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
REQUESTS = "expertmesh.requests"  # the name of the logger whose messages are JSON objects
USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # the attributes that every record has
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """A `JsonLines` formatter turns a log record into one line of JSON.

    The fields are the time (UTC), the level, the logger, the process's name, the process's id, the message, and the
    traceback if there is one. The caller's `extra` adds further fields, such as `request_id`.
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
            # `formatException` would call `print`, and Ray replaces `print` by a function that splits text into lines.
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure(process: str, log_format: LogFormat) -> None:
    """Configure logging: write the log of Expertmesh's modules to standard error.

    `process` is the name of this process in the log, such as "backbone".
    """
    handler = logging.StreamHandler(sys.__stderr__)  # not `sys.stderr`, which Serve replaces by a logger
    handler.setFormatter(JsonLines(process) if log_format == "json" else logging.Formatter(TEXT))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
