"""`run_checks` runs the checks of one client and prints a JSON line for each; the other names are shared questions.

The scripts beside this file run in virtual environments of their own, which have one client each and nothing of ours.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

MODEL = "demo"
KEY = "any"  # the server asks for no key, but clients insist on one
CITIES = ["Paris", "Rome"]
WEATHER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": CITIES}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tell the weather.", "parameters": WEATHER_SCHEMA},
}
QUESTION = "How warm is it in Paris?"
TOO_LONG = "word " * 300_000  # more tokens than the demo model's context
Error = TypeVar("Error", bound=BaseException)


def run_checks(*checks: Callable[[str], Any]) -> None:
    """Call each check with the server's address, and exit with code 1 if one of them fails.

    A check is named after its function. A check fails if it raises an error.
    """
    url, has_failed = sys.argv[1], False
    for check in checks:
        error = None
        try:
            result = check(url)
            if inspect.isawaitable(result):
                asyncio.run(_awaited(result))
        except BaseException as raised:
            traceback.print_exc()
            error, has_failed = f"{type(raised).__name__}: {raised}", True
        print(json.dumps({"check": check.__name__, "error": error}), flush=True)
    sys.exit(has_failed)


async def _awaited(result: Any) -> Any:
    return await result


def error_of(kind: type[Error], call: Callable[[], object]) -> Error:
    """Return the error of class `kind` that `call` raises; raise AssertionError if `call` raises none."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def check_weather(arguments: str | dict[str, Any]) -> None:
    """Assert that the arguments of a call of the weather tool match the tool's schema."""
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert values["city"] in CITIES, values
    assert 1 <= values["days"] <= 7, values
    assert set(values) == {"city", "days"}, values
