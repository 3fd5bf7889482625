"""`refusal_response` and `refusal_json` give an `ApiError` the form of Anthropic's API.

Source: Anthropic's API reference for errors, and the error classes of the `anthropic` client.
"""

from __future__ import annotations

from typing import Any

from fastapi import Response

from services.gateway.anthropic.messages_body import THREAD_UNSUPPORTED
from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.request_id import MAX_REQUEST_ID_LEN
from services.gateway.schema.json_text import dumps

# Anthropic's `type` and HTTP status of errors, where they are not the general ones. A busy server answers 529, which
# clients retry like 429, because 429 would tell users that their own quota is used up.
TYPES = {
    ApiRefusal.UNAUTHENTICATED: ("authentication_error", 401),
    ApiRefusal.FORBIDDEN: ("permission_error", 403),
    ApiRefusal.NOT_FOUND: ("not_found_error", 404),
    ApiRefusal.TOO_LARGE: ("request_too_large", 413),
    ApiRefusal.OVERLOADED: ("overloaded_error", 529),
    ApiRefusal.UNAVAILABLE: ("overloaded_error", 503),
    ApiRefusal.DEADLINE: ("timeout_error", 504),
}
PARAM_NAMES = {  # Anthropic's names of parameters that begin the sentences of errors
    r"^tools\[(\d+)\]\.function\.(name|strict)": r"tools[\1].\2",
    r"^tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    "^stop": "stop_sequences",
    "^continue_final_message may not be true": "The last message may not be the assistant's",
}


def is_of_messages(path: str) -> bool:
    """Return True if errors of requests to `path` must have Anthropic's form."""
    return f"{path}/".startswith("/v1/messages/")


def refusal_response(error: ApiError, request_id: str) -> Response:
    _, status = _type_and_status(error)
    headers = {"request-id": request_id[:MAX_REQUEST_ID_LEN], **error.headers}
    return Response(refusal_json(error, request_id), status, headers, "application/json")


def refusal_json(error: ApiError, request_id: str) -> str:
    """Return the error as JSON, for a response of its own or for an `error` event of a stream."""
    type_, _ = _type_and_status(error)
    fields: dict[str, Any] = {"type": type_, "message": error.renamed(PARAM_NAMES).message}
    if error.code == THREAD_UNSUPPORTED:
        fields["details"] = {"error_code": error.code, "unsupported": ["thread"]}
    return dumps({"type": "error", "error": fields, "request_id": request_id})


def _type_and_status(error: ApiError) -> tuple[str, int]:
    status = error.refusal.status
    return TYPES.get(error.refusal, ("invalid_request_error" if status < 500 else "api_error", status))
