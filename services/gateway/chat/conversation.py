"""A `Conversation` holds the messages of a chat request in the form that the chat template needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

RESERVED_KWARGS = {  # parameters of apply_chat_template (transformers) that clients must not set
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


# for `Conversation.size`
MANY = 256  # messages that are many
SCALARS = (bool, int, float, str, type(None))  # values that a template can render in little time
CHARS_PER_MESSAGE, CHARS_PER_TOOL = 64, 1024


@dataclass(frozen=True)
class PastCall:
    """A `PastCall` is a tool call that the model made in an earlier turn of the conversation."""

    id: str
    name: str
    arguments: str  # the text of a JSON object

    def to_template(self) -> dict[str, Any]:
        """Return the call in the form that Hugging Face chat templates expect, with the arguments as an object."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ChatMessage:
    """A `ChatMessage` is one message of a conversation, from the system, the user, the assistant or a tool."""

    role: str
    content: str | None
    name: str = ""
    reasoning: str = ""
    tool_calls: tuple[PastCall, ...] = ()
    tool_call_id: str = ""

    def to_template(self) -> dict[str, Any]:
        """Return the message in the form that Hugging Face chat templates expect, without empty optional fields."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            fields["tool_calls"] = [call.to_template() for call in self.tool_calls]
        optional = {"name": self.name, "reasoning_content": self.reasoning, "tool_call_id": self.tool_call_id}
        return fields | {name: value for name, value in optional.items() if value}


def check_message(message: ChatMessage, param: str) -> ChatMessage:
    """Return the message, with the role "developer" replaced by "system".

    Raises ValueError if a field does not fit the role. `param` is the name of the client's parameter, for the error
    message.
    """
    is_assistant, is_tool = message.role == "assistant", message.role == "tool"
    if message.tool_calls and not is_assistant:
        raise ValueError(f"{param}.tool_calls may only be given where the role is 'assistant'.")
    if message.reasoning and not is_assistant:
        raise ValueError(f"{param}.reasoning_content may only be given where the role is 'assistant'.")
    if bool(message.tool_call_id) != is_tool:
        raise ValueError(f"{param}.tool_call_id must be given where the role is 'tool', and only there.")
    if message.content is None and not (is_assistant or is_tool):
        raise ValueError(f"{param}.content is missing, but required.")
    # "developer" is OpenAI's new name for the role "system"; chat templates know only the old name.
    return replace(message, role="system") if message.role == "developer" else message


@dataclass(frozen=True)
class Conversation:
    """A `Conversation` holds all inputs from which the chat template renders a prompt."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # tool definitions in OpenAI's form
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # arguments that the model's template defines
    add_generation_prompt: bool = True  # True: the prompt ends with the markup that begins the assistant's next turn
    continue_final_message: bool = False  # True: the prompt ends inside the last message, which the answer continues

    @property
    def continued_field(self) -> str | None:
        """Return the name of the last message's field that the answer continues, or None if it continues none."""
        if not self.continue_final_message:
            return None
        last = self.messages[-1]
        return "reasoning_content" if last.reasoning and not last.content else "content"

    def check(self) -> None:
        """Raise ValueError if the conversation holds no messages, or if the last message cannot be continued."""
        if not self.messages:
            raise ValueError("messages must hold at least one message.")
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            raise ValueError("continue_final_message may not be true together with add_generation_prompt.")
        if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
            raise ValueError("continue_final_message needs a last message of the assistant without tool_calls.")

    @property
    def size(self) -> int:
        """Return about how many characters the rendered text has, or a lower bound above a million."""
        if len(self.messages) > MANY or any(not isinstance(value, SCALARS) for value in self.template_kwargs.values()):
            return 1 << 20
        texts = [message.content or "" for message in self.messages]
        texts += [message.reasoning for message in self.messages]
        texts += [call.arguments for message in self.messages for call in message.tool_calls]
        return sum(map(len, texts)) + CHARS_PER_MESSAGE * len(self.messages) + CHARS_PER_TOOL * len(self.tools)
