"""Schemathesis loads this module, which names the served model in requests and allows the 504 for a timeout."""

from __future__ import annotations

from typing import Any

import schemathesis
from checks import MODEL

MAX_TOKENS = 4
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Name the served model, so that more than the check of the name is tested, and shorten the answers."""
    if not isinstance(body, dict) or not isinstance(body.get("model", ""), str):
        return body
    names = [name for name in LIMITS if name in body] or ["max_output_tokens" if "input" in body else "max_tokens"]
    return {**body, "model": MODEL, **{name: _shortened(body.get(name)) for name in names}}


def _shortened(limit: Any) -> Any:
    return MAX_TOKENS if limit is None or limit == -1 or (type(limit) is int and limit > MAX_TOKENS) else limit


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: Any) -> Any:
    return {**path_parameters, "model_id": MODEL} if "model_id" in (path_parameters or {}) else path_parameters


@schemathesis.check
def no_needless_server_error(ctx: Any, response: Any, case: Any) -> None:
    """Fail for a 5xx, except for the 504 of a request that sets a timeout and was not answered in this time."""
    has_timeout = isinstance(case.body, dict) and "timeout" in case.body
    if response.status_code >= 500 and not (response.status_code == 504 and has_timeout):
        raise AssertionError(f"the server answered {response.status_code}: {response.text[:300]}")
