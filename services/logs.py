"""What every process of ours logs: one JSON object a line on its standard error, which Ray keeps in a file for each."""

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
REQUESTS = "expertmesh.requests"  # its messages are JSON objects themselves
USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # what every record has
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """Time (UTC), level, logger, process, what was given as `extra` (such as `request_id`), message, traceback."""

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
            # Not `formatException`: it prints, and Ray puts a `print` of its own in place that mangles the lines.
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure(process: str, log_format: LogFormat) -> None:
    """Sends what our modules log to standard error; `process` names this one, such as "backbone"."""
    handler = logging.StreamHandler(sys.__stderr__)  # Serve puts a logger of its own in the place of sys.stderr
    handler.setFormatter(JsonLines(process) if log_format == "json" else logging.Formatter(TEXT))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
