"""An `OutputBuilder` makes the output items of a response, and the events that report them, from the answer's deltas.

An event is a dictionary of OpenAI's Responses API without its `sequence_number`. A response that is not streamed is
built from the same events, so that both ways give the same items.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from services.gateway.chat.text_delta import ScoredToken, TextDelta
from services.gateway.chat.tool_call_delta import ToolCallDelta
from services.gateway.responses.items import Item, encode_reasoning, new_id

Event = dict[str, Any]

DELTA_EVENTS = {  # prefix of the type of the events that report a piece of an item, by the item's type
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


class _OpenItem:
    """An `_OpenItem` is the output item that the model is writing: reasoning, a message or a tool call."""

    def __init__(self, index: int, kind: str, **fields: Any) -> None:
        self.kind, self.item = kind, {"id": new_id(kind), "type": kind, "status": "in_progress", **fields}
        self._place: dict[str, Any] = {"item_id": self.item["id"], "output_index": index}
        if kind != "function_call":
            self._place["content_index"] = 0
        self._index, self._pieces = index, list[str]()
        self._logprobs: list[dict[str, Any]] = []

    def start(self) -> Iterator[Event]:
        yield {"type": "response.output_item.added", "output_index": self._index, "item": dict(self.item)}
        if self.kind != "function_call":
            yield self._event("response.content_part.added", part=self._part("", []))

    def push(self, piece: str, logprobs: list[dict[str, Any]]) -> Event:
        """Return the event that adds `piece` to the item's text or arguments."""
        self._pieces.append(piece)
        self._logprobs += logprobs
        more = {"logprobs": logprobs} if self.kind == "message" else {}
        return self._event(f"{DELTA_EVENTS[self.kind]}.delta", delta=piece, **more)

    def end(self, status: str, is_encrypted: bool) -> Iterator[Event]:
        """Complete the item, and yield the events of its end."""
        text = "".join(self._pieces)
        self.item["status"] = status
        done = f"{DELTA_EVENTS[self.kind]}.done"
        if self.kind == "function_call":
            self.item["arguments"] = text
            yield self._event(done, name=self.item["name"], arguments=text)
        else:
            more = {"logprobs": self._logprobs} if self.kind == "message" else {}
            yield self._event(done, text=text, **more)
            part = self._part(text, self._logprobs)
            yield self._event("response.content_part.done", part=part)
            self.item["content"] = [part]
        if self.kind == "reasoning" and is_encrypted:
            self.item["encrypted_content"] = encode_reasoning(text)
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item}

    def _event(self, type_: str, **fields: Any) -> Event:
        return {"type": type_, **self._place, **fields}

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class OutputBuilder:
    """An `OutputBuilder` collects the output `items` of one response.

    `is_encrypted` says whether reasoning items get an `encrypted_content`. Logprobs belong to messages: the logprobs of
    reasoning and of tool calls are not shown, because their items have no place for logprobs.
    """

    def __init__(self, is_encrypted: bool) -> None:
        self.items: list[Item] = []  # complete items
        self._is_encrypted = is_encrypted
        self._open: _OpenItem | None = None
        self._call_index = -1  # index of the tool call that is open
        self._num_reasoning = 0  # tokens of reasoning so far
        self._scores: list[ScoredToken] = []  # scores of tokens whose text has not been shown yet

    def push(self, delta: TextDelta) -> Iterator[Event]:
        """Add a delta of the answer, and yield the events that report what is new."""
        if delta.reasoning:
            yield from self._enter("reasoning", summary=[], content=[])
            yield from self._push(delta.reasoning)
        self._scores += delta.logprobs[delta.num_reasoning - self._num_reasoning :]
        self._num_reasoning = delta.num_reasoning
        calls = list(delta.calls)
        if calls and calls[0].index == self._call_index:  # the rest of a call comes before the text that follows it
            yield from self._push(calls.pop(0).arguments)
        if delta.text:
            yield from self._enter("message", role="assistant", content=[])
            yield from self._push(delta.text)
        for call in calls:
            yield from self._push_call(call)

    def finish(self, is_complete: bool) -> Iterator[Event]:
        """End the answer, and yield the events that report its last item.

        A complete answer has a message or a tool call, even if the message is empty.
        """
        if self._open is None or (self._open.kind == "reasoning" and is_complete):
            yield from self._enter("message", role="assistant", content=[])
        if self._scores and self._open and self._open.kind == "message":
            yield from self._push("")
        yield from self._end("completed" if is_complete else "incomplete")

    def _push_call(self, call: ToolCallDelta) -> Iterator[Event]:
        if call.index != self._call_index:
            fields = {"call_id": call.id, "name": call.name, "arguments": ""}
            yield from self._begin("function_call", **fields)
            self._call_index = call.index
        yield from self._push(call.arguments)

    def _enter(self, kind: str, **fields: Any) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind, **fields)

    def _begin(self, kind: str, **fields: Any) -> Iterator[Event]:
        yield from self._end("completed")
        self._open = _OpenItem(len(self.items), kind, **fields)
        yield from self._open.start()

    def _push(self, piece: str) -> Iterator[Event]:
        assert self._open is not None
        scores, self._scores = self._scores, []
        logprobs = list(map(_logprob, scores)) if self._open.kind == "message" else []
        if piece or logprobs:
            yield self._open.push(piece, logprobs)

    def _end(self, status: str) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.end(status, self._is_encrypted)
            self.items.append(self._open.item)
            self._open, self._call_index = None, -1


def _logprob(score: ScoredToken) -> dict[str, Any]:
    return {**_token(score), "top_logprobs": list(map(_token, score.top))}


def _token(score: ScoredToken) -> dict[str, Any]:
    return {"token": score.text, "bytes": list(score.data), "logprob": score.logprob}
