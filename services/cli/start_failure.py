"""`reason_of` finds, in what Ray Serve reports about a deployment, why the deployment's replicas do not start.

Ray Serve reports a sentence of its own, the line `Error:`, and the traceback of the replica's last attempt.
"""

from __future__ import annotations

import re

MARK = "Error:\n"  # stands between Serve's own sentence and the replica's error
FRAME = re.compile(r'\s*File ".*", line \d+')
DIED = ("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError")
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
SELF_EXPLAINING = ("ValueError", "RuntimeError")  # errors whose message is a sentence without the name of the class


def reason_of(message: str) -> str | None:
    """Return the reason in Serve's `message` without a full stop, or None if the message is not about a failed start.

    The reason is the first line of the error that ended the constructor: the last error of a traceback with several,
    and the first one inside an exception group.
    """
    _, mark, report = message.partition(MARK)
    if not mark or not report.strip():
        return None
    lines = [re.sub(r"^\s*\| ?", "", line) for line in report.rstrip().splitlines()]
    lines = [line for line in lines if not re.fullmatch(r"[\s+|]*\+-[-+\s\d]*", line)]
    frames = [i for i, line in enumerate(lines) if FRAME.match(line)]
    # After a frame come indented lines with its code, and then the error.
    errors = [line for line in lines[frames[-1] + 1 if frames else 0 :] if line.strip() and not line.startswith(" ")]
    if len(errors) > 1 and re.match(r"[\w.]*ExceptionGroup: ", errors[0]):
        errors = errors[1:]
    return _describe(errors[0]) if errors else None


def _describe(error: str) -> str:
    """Return a phrase for the last line of a traceback, such as `ValueError: the port is in use`."""
    found = re.fullmatch(r"([A-Za-z_][\w.]*)(?:: (.*)|\(.*\))?", error)
    if found is None:
        return error.strip().rstrip(".")
    kind, text = found[1].rpartition(".")[2], (found[2] or "").strip().rstrip(".")
    if kind in DIED:
        return "its process was killed, as happens when the machine has too little memory"
    allocation = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
    if kind in OUT_OF_MEMORY or allocation:
        return f"it ran out of memory ({f'it tried to allocate {allocation[1]}' if allocation else text or kind})"
    if not text:
        return kind
    return text if kind in SELF_EXPLAINING else f"{text} ({kind})"
