"""The conversation that a chat request sends, as the chat template takes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

RESERVED_KWARGS = {  # what transformers' apply_chat_template takes for itself
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


@dataclass(frozen=True)
class PastCall:
    """A tool call of an earlier turn; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    def to_template(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str | None
    name: str = ""
    reasoning: str = ""
    tool_calls: tuple[PastCall, ...] = ()
    tool_call_id: str = ""

    def to_template(self) -> dict[str, Any]:
        """A message as chat templates of Hugging Face expect it: arguments are an object, absent fields are absent."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            fields["tool_calls"] = [call.to_template() for call in self.tool_calls]
        optional = {"name": self.name, "reasoning_content": self.reasoning, "tool_call_id": self.tool_call_id}
        return fields | {name: value for name, value in optional.items() if value}


def check_message(message: ChatMessage, place: str) -> ChatMessage:
    """Raises ValueError, with `place` in the sentence, for a field that does not fit the role."""
    is_assistant, is_tool = message.role == "assistant", message.role == "tool"
    if message.tool_calls and not is_assistant:
        raise ValueError(f"{place}.tool_calls may only be given where the role is 'assistant'.")
    if message.reasoning and not is_assistant:
        raise ValueError(f"{place}.reasoning_content may only be given where the role is 'assistant'.")
    if bool(message.tool_call_id) != is_tool:
        raise ValueError(f"{place}.tool_call_id must be given where the role is 'tool', and only there.")
    if message.content is None and not (message.tool_calls or message.reasoning):
        raise ValueError(f"{place}.content is missing, but required.")
    # "developer" is OpenAI's newer name of the system role; templates know the old one.
    return replace(message, role="system") if message.role == "developer" else message


@dataclass(frozen=True)
class Conversation:
    """What the template renders; `tools` in OpenAI's shape, `template_kwargs` as the model's template defines them."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True


def template_kwargs(kwargs: Mapping[str, Any] | None, enable_thinking: bool | None) -> dict[str, Any]:
    """Arguments of the chat template; `enable_thinking` may be given by itself as well."""
    given = dict(kwargs or {})
    if reserved := sorted(given.keys() & RESERVED_KWARGS):
        raise ValueError(f"chat_template_kwargs must not hold {reserved[0]!r}, which the server itself sets.")
    if enable_thinking is not None:
        if given.get("enable_thinking", enable_thinking) is not enable_thinking:
            raise ValueError("enable_thinking must be the same in chat_template_kwargs where both are given; give one.")
        given["enable_thinking"] = enable_thinking
    return given
