"""A `MessageEvents` formats an answer as the stream of events of Anthropic's API, and `whole_message` as one message.

Source: Anthropic's API reference for messages and streaming. Events are built from plain dictionaries, because building
the types of the `anthropic` package takes far longer for every token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pydantic_core

from services.gateway.chat.text_delta import TextDelta
from services.gateway.chat.tool_call_delta import ToolCallDelta
from services.gateway.connection import server_event
from services.gateway.schema.json_text import dumps

ENCODE = json.JSONEncoder(ensure_ascii=False).encode
SIGNATURE = "expertmesh"  # clients send the signature back with the reasoning; this server ignores it
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def whole_message(message_id: str, model: str, delta: TextDelta, hides_thinking: bool) -> str:
    """Return the JSON of a complete response. `delta` is the whole answer; it holds complete tool calls."""
    content: list[dict[str, Any]] = []
    if delta.reasoning:
        thinking = "" if hides_thinking else delta.reasoning
        content.append({"type": "thinking", "thinking": thinking, "signature": SIGNATURE})
    if delta.text:
        content.append({"type": "text", "text": delta.text})
    content += [_tool_use(call) | {"input": _input(call.arguments)} for call in delta.calls]
    return dumps(_message(message_id, model, delta) | {"content": content, **_end(delta)})


def _message(message_id: str, model: str, delta: TextDelta) -> dict[str, Any]:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(delta),
    }


def _usage(delta: TextDelta) -> dict[str, Any]:
    """Return the token usage; as in Anthropic's API, `input_tokens` leaves out the tokens from the cache."""
    return {
        "input_tokens": delta.num_prompt - delta.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": delta.num_cached,
        "output_tokens": delta.num_generated,
        "output_tokens_details": {"thinking_tokens": delta.num_reasoning},
    }


def _end(delta: TextDelta) -> dict[str, str | None]:
    """Return why the answer ended; `delta` is its last delta."""
    is_sequence = delta.finish_reason == "stop" and bool(delta.stop_string)
    reason = "stop_sequence" if is_sequence else STOP_REASONS[delta.finish_reason or "stop"]
    return {"stop_reason": reason, "stop_sequence": delta.stop_string if is_sequence else None}


def _tool_use(call: ToolCallDelta) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id.replace("call_", "toolu_", 1), "name": call.name, "input": {}}


def _input(arguments: str) -> Any:
    """Return the arguments of a call as an object, which lacks incomplete arguments if the answer was cut off.

    Arguments that are nested more than 200 deep become an empty object, because the parser cannot read them.
    """
    try:
        return pydantic_core.from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}


class MessageEvents:
    """A `MessageEvents` formats the deltas of one answer, in order: `start`, `push` for each delta, and `finish`.

    A block of the message is open while text, reasoning or the arguments of one tool call arrive. Reasoning comes
    before the text and the calls of the same delta. Pieces of the open call come before the text, and new calls after.
    """

    def __init__(self, message_id: str, model: str, hides_thinking: bool) -> None:
        self._id, self._model, self._hides_thinking = message_id, model, hides_thinking
        self._index, self._open = -1, ""  # index and type of the block that is open; "": no block is open

    def start(self, first: TextDelta) -> Iterator[str]:
        """Yield the events before the content. `first` is the first delta, which holds the prompt's token usage."""
        yield _event("message_start", message=_message(self._id, self._model, first))
        yield _event("ping")

    def push(self, delta: TextDelta) -> Iterator[str]:
        """Yield the events for one delta."""
        if delta.reasoning:
            yield from self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            if not self._hides_thinking:
                yield self._delta("thinking_delta", "thinking", delta.reasoning)
        is_continued = bool(delta.calls) and not delta.calls[0].id
        if is_continued:
            yield from self._arguments(delta.calls[0])
        if delta.text:
            yield from self._enter("text", {"type": "text", "text": ""})
            yield self._delta("text_delta", "text", delta.text)
        for call in delta.calls[is_continued:]:
            yield from self._leave()
            yield from self._enter("tool_use", _tool_use(call))
            yield from self._arguments(call)

    def finish(self, last: TextDelta) -> Iterator[str]:
        """Yield the events after the content. `last` is the last delta, with the reason why the answer ended."""
        yield from self._leave()
        yield _event("message_delta", delta=_end(last), usage=_usage(last))
        yield _event("message_stop")

    def _arguments(self, call: ToolCallDelta) -> Iterator[str]:
        if call.arguments:
            yield self._delta("input_json_delta", "partial_json", call.arguments)

    def _enter(self, type_: str, block: dict[str, Any]) -> Iterator[str]:
        if self._open != type_:
            yield from self._leave()
            self._index, self._open = self._index + 1, type_
            yield _event("content_block_start", index=self._index, content_block=block)

    def _leave(self) -> Iterator[str]:
        if self._open == "thinking":
            yield self._delta("signature_delta", "signature", SIGNATURE)
        if self._open:
            yield _event("content_block_stop", index=self._index)
        self._open = ""

    def _delta(self, type_: str, key: str, value: str) -> str:
        return _event("content_block_delta", index=self._index, delta={"type": type_, key: value})


def _event(name: str, **fields: Any) -> str:
    return server_event(ENCODE({"type": name, **fields}), name)
