"""An item is one entry of a conversation in OpenAI's Responses API: a message, a tool call, its output or reasoning.

Items are plain dictionaries. `parse_items` checks what a client sent and keeps only the fields that have an effect, so
that all other code may rely on these fields. `to_messages` turns items into the messages that the chat template needs.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.gateway.chat.conversation import ChatMessage, PastCall, check_message
from services.gateway.chat.tools import parse_arguments

Item = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
ENCODED = "expertmesh:"  # begins every `encrypted_content` that this server has written
KINDS = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "item_reference": "",
}


def new_id(kind: str) -> str:
    """Return an unused id for an item of the type `kind`; nobody can guess the id."""
    return f"{KINDS[kind]}_{secrets.token_hex(16)}"


def encode_reasoning(text: str) -> str:
    """Return reasoning as `encrypted_content`, with which clients send the reasoning back in their next request.

    The reasoning is also shown as text, so there is nothing to hide: the text is only encoded.
    """
    return ENCODED + base64.b64encode(text.encode("utf-8", "replace")).decode()


def _refuse_reference(item_id: str) -> Item:
    raise ValueError(f"The item {item_id!r:.100} may not be named here.")


def parse_items(value: Any, find: Callable[[str], Item] = _refuse_reference) -> list[Item]:
    """Return the checked items of the request's `input`, which is a string or a list.

    `find` returns the stored item that an `item_reference` names. An item has an id only if the client gave the id.
    Raises ValueError for the first mistake.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"input must be a string or a list of items, not {value!r:.100}.")
    return [_parse(item, f"input[{index}]", find) for index, item in enumerate(value)]


def _parse(item: Any, param: str, find: Callable[[str], Item]) -> Item:
    if not isinstance(item, dict):
        raise ValueError(f"{param} must be a JSON object.")
    kind = item.get("type") or ("item_reference" if "role" not in item and "id" in item else "message")
    match kind:
        case "message":
            return _message(item, param)
        case "function_call":
            return _with_id(item, kind, param, "call_id", "name", "arguments")
        case "function_call_output":
            output = _texts(item.get("output"), f"{param}.output", TEXT_PARTS)
            return _with_id(item, kind, param, "call_id") | {"output": "".join(part["text"] for part in output)}
        case "reasoning":
            return _reasoning(item, param)
        case "item_reference":
            return find(_string(item, "id", param))
    allowed = ", ".join(map(repr, KINDS))
    raise ValueError(f"{param}.type must be one of {allowed}, because nothing else is supported, not {kind!r:.100}.")


def _with_id(item: Item, kind: str, param: str, *names: str) -> Item:
    item_id = item.get("id")
    own = {"id": item_id} if isinstance(item_id, str) and item_id else {}
    fields = {name: _string(item, name, param) for name in names}
    return {**own, "type": kind, "status": "completed", **fields}


def _string(item: Item, name: str, param: str) -> str:
    value = item.get(name)
    if value is None:
        raise ValueError(f"{param}.{name} is missing, but required.")
    if not isinstance(value, str):
        raise ValueError(f"{param}.{name} must be a string, not {value!r:.100}.")
    return value


def _message(item: Item, param: str) -> Item:
    role = item.get("role")
    if role not in ROLES:
        raise ValueError(f"{param}.role must be one of {', '.join(map(repr, ROLES))}, not {role!r:.100}.")
    content = _texts(item.get("content"), f"{param}.content", (*TEXT_PARTS, "refusal"))
    own = {"type": "output_text", "annotations": []} if role == "assistant" else {"type": "input_text"}
    return _with_id(item, "message", param) | {"role": role, "content": [own | part for part in content]}


def _texts(value: Any, param: str, kinds: Sequence[str]) -> list[Item]:
    """Return one {"text": ...} for each text part of `value`, which is a string or a list of parts."""
    if value is None:
        raise ValueError(f"{param} is missing, but required.")
    if isinstance(value, str):
        return [{"text": value}]
    if not isinstance(value, list):
        raise ValueError(f"{param} must be a string or a list of parts, not {value!r:.100}.")
    return [{"text": _text(part, f"{param}[{index}]", kinds)} for index, part in enumerate(value)]


def _text(part: Any, param: str, kinds: Sequence[str]) -> str:
    if not isinstance(part, dict):
        raise ValueError(f"{param} must be a JSON object.")
    kind = part.get("type")
    if kind not in kinds:
        allowed = " or ".join(map(repr, kinds))
        raise ValueError(f"{param}.type must be {allowed}, because the model reads only text, not {kind!r:.100}.")
    return _string(part, "refusal" if kind == "refusal" else "text", param)


def _reasoning(item: Item, param: str) -> Item:
    """Return a reasoning item with its text: the `content`, or else the text in this server's `encrypted_content`.

    Reasoning that another server encrypted cannot be read and has no text.
    """
    if item.get("content"):
        parts = _texts(item["content"], f"{param}.content", ("reasoning_text", "text"))
    else:
        parts = [{"text": text}] if (text := _decoded(item.get("encrypted_content"))) else []
    return _with_id(item, "reasoning", param) | {
        "summary": [],
        "content": [{"type": "reasoning_text"} | part for part in parts],
    }


def _decoded(encrypted: Any) -> str:
    if not isinstance(encrypted, str) or not encrypted.startswith(ENCODED):
        return ""
    try:
        return base64.b64decode(encrypted.removeprefix(ENCODED), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def to_messages(items: Sequence[Item], instructions: str | None, num_earlier: int = 0) -> tuple[ChatMessage, ...]:
    """Return the messages of the conversation that the checked `items` make.

    Reasoning, a message and tool calls of the assistant that follow each other become one message, as the model wrote
    them. `instructions` become the first message, joined with a system message at the start of `items`, because many
    chat templates allow only one. The first `num_earlier` items come from earlier requests: error messages count the
    items after them, from `input[0]`.
    """
    turns = _Turns()
    for index, item in enumerate(items, -num_earlier):
        turns.add(item, f"input[{index}]")
    turns.end()
    messages = turns.messages
    if instructions and messages and messages[0].role == "system":
        messages[0] = ChatMessage("system", f"{instructions}\n\n{messages[0].content}")
    elif instructions:
        messages.insert(0, ChatMessage("system", instructions))
    return tuple(messages)


@dataclass
class _Turns:
    """A `_Turns` joins items to messages; the last three fields are a message of the assistant that may still grow."""

    messages: list[ChatMessage] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    content: str | None = None
    calls: list[PastCall] = field(default_factory=list)

    def add(self, item: Item, param: str) -> None:
        match item["type"]:
            case "reasoning":
                self._end_if_answered()
                self.reasoning += [part["text"] for part in item["content"]]
            case "function_call":
                arguments = parse_arguments(item["arguments"], f"{param}.arguments")
                self.calls.append(PastCall(item["call_id"], item["name"], arguments))
            case "function_call_output":
                self._add(ChatMessage("tool", item["output"], tool_call_id=item["call_id"]), param)
            case "message" if item["role"] == "assistant":
                self._end_if_answered()
                self.content = _content(item)
            case "message":
                self._add(ChatMessage(item["role"], _content(item)), param)

    def end(self) -> None:
        """End the assistant's message, if there is one."""
        reasoning = "".join(self.reasoning)
        if self.content is not None or reasoning or self.calls:
            message = ChatMessage("assistant", self.content, reasoning=reasoning, tool_calls=tuple(self.calls))
            self.messages.append(message)
        self.reasoning, self.content, self.calls = [], None, []

    def _end_if_answered(self) -> None:
        if self.content is not None or self.calls:
            self.end()

    def _add(self, message: ChatMessage, param: str) -> None:
        self.end()
        self.messages.append(check_message(message, param))


def _content(item: Item) -> str:
    return "".join(part["text"] for part in item["content"])
