"""`check_refused` checks the error that a refused request gets in the OpenAI API."""

from __future__ import annotations

from typing import Any

import httpx


def check_refused(answer: httpx.Response, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Check the status and the sentence of an error, and return the error."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].startswith(message), error["message"]
    assert error["message"][-1] in ".;", error["message"]
    assert param is None or error["param"] == param
    return error
