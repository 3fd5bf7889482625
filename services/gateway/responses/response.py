"""A `ResponseForm` gives responses and events the form of OpenAI's Responses API.

Source: OpenAI's API reference for responses and their streaming events. Responses are built from plain dictionaries,
because building the types of the `openai` package takes 150 µs for every token. All characters outside ASCII are
escaped, because a response repeats the request, which may hold half of a surrogate pair.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from services.engine.contract.token_output import FinishReason
from services.gateway.chat.text_delta import TextDelta
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.responses.items import Item

ENCODE = json.JSONEncoder().encode


@dataclass
class ResponseForm:
    """A `ResponseForm` holds the fields that are the same in every state of one response."""

    id: str
    model: str
    echo: dict[str, Any]  # the fields of the request that the response repeats
    created_at: int = field(default_factory=lambda: int(time.time()))

    def in_progress(self) -> dict[str, Any]:
        return self._response("in_progress", [], None)

    def ended(self, output: list[Item], last: TextDelta) -> dict[str, Any]:
        """Return the response with all its output; `last` is the last delta of its answer."""
        usage = TokenUsage(1)
        usage.add(last)
        if is_complete(last):
            return self._response("completed", output, _usage(usage), completed_at=int(time.time()))
        details = {"reason": "max_output_tokens"}
        return self._response("incomplete", output, _usage(usage), incomplete_details=details)

    def failure(self, output: list[Item], error: ApiError) -> list[dict[str, Any]]:
        """Return the events that end a stream whose answer failed after the items `output` were complete."""
        code = "rate_limit_exceeded" if error.refusal is ApiRefusal.OVERLOADED else "server_error"
        failed = self._response("failed", output, None, error={"code": code, "message": error.message})
        return [
            {"type": "error", "code": code, "message": error.message, "param": error.param},
            {"type": "response.failed", "response": failed},
        ]

    def _response(
        self, status: str, output: list[Item], usage: dict[str, Any] | None, **changed: Any
    ) -> dict[str, Any]:
        head = {"id": self.id, "object": "response", "created_at": self.created_at, "status": status}
        fields = {"completed_at": None, "error": None, "incomplete_details": None, "model": self.model}
        return head | fields | self.echo | {"output": output, "usage": usage} | changed


def is_complete(last: TextDelta) -> bool:
    """Return True if the model ended its answer itself; `last` is the last delta of the answer."""
    return last.finish_reason != FinishReason.LENGTH


def _usage(usage: TokenUsage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
