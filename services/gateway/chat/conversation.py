"""A `Conversation` holds the messages of a chat request in the form that the chat template needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

RESERVED_KWARGS = {  # parameters of apply_chat_template (transformers) that clients must not set
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


# constants for `Conversation.size`
MANY = 256  # a conversation with more messages counts as large, whatever the messages hold
SCALARS = (bool, int, float, str, type(None))  # values that a template can render in little time
CHARS_PER_MESSAGE = CHARS_PER_CALL = 64
CHARS_PER_VALUE = 8  # characters that a JSON value other than a string counts as
MANY_CHARS = 1 << 16  # characters at which `json_size` stops, which bounds its time to about 1 ms


def json_size(*values: Any) -> int:
    """Return about how many characters the JSON `values` have, or a number above MANY_CHARS if they have more."""
    waiting, size = list(values), 0
    while waiting and size <= MANY_CHARS:
        value = waiting.pop()
        size += len(value) if isinstance(value, str) else CHARS_PER_VALUE
        if isinstance(value, Mapping):
            waiting += islice(chain.from_iterable(value.items()), MANY_CHARS)
        elif isinstance(value, list | tuple):
            waiting += islice(value, MANY_CHARS)
    return size


@dataclass(frozen=True)
class PastCallForm:
    """A `PastCallForm` is the form in which a chat template needs the calls of earlier turns.

    The templates of the first DeepSeek-V3 and of R1 show the calls of a message only if its content is null. Others,
    such as the template of Qwen3, search the content for `</think>` and fail if the content is null.
    """

    is_text: bool = False  # True: the arguments are JSON text; False: the arguments are an object
    is_null: bool = False  # True: the content of a message with calls and without text is null; False: it is ""
    is_apart: bool = False  # True: the text beside calls needs a message of its own, before the message with the calls


@dataclass(frozen=True)
class PastCall:
    """A `PastCall` is a tool call that the model made in an earlier turn of the conversation."""

    id: str
    name: str
    arguments: str  # the text of a JSON object

    def to_template(self, form: PastCallForm) -> dict[str, Any]:
        """Return the call in the form that Hugging Face chat templates expect."""
        arguments = self.arguments if form.is_text else json.loads(self.arguments)
        function = {"name": self.name, "arguments": arguments}
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

    @property
    def size(self) -> int:
        """Return about how many characters the rendered message has."""
        texts = [self.content or "", self.reasoning, self.name, self.tool_call_id]
        texts += [text for call in self.tool_calls for text in (call.id, call.name, call.arguments)]
        return sum(map(len, texts)) + CHARS_PER_MESSAGE + CHARS_PER_CALL * len(self.tool_calls)

    def to_template(self, form: PastCallForm) -> list[dict[str, Any]]:
        """Return the message in the form that Hugging Face chat templates expect, without empty optional fields.

        The list holds two messages if the template needs the text beside calls apart from the calls.
        """
        if form.is_apart and self.tool_calls and self.content:
            text, calls = replace(self, tool_calls=()), replace(self, content=None, reasoning="")
            return [*text.to_template(form), *calls.to_template(form)]
        fields: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.tool_calls:
            fields["content"] = self.content or (None if form.is_null else "")
            fields["tool_calls"] = [call.to_template(form) for call in self.tool_calls]
        optional = {"name": self.name, "reasoning_content": self.reasoning, "tool_call_id": self.tool_call_id}
        return [fields | {name: value for name, value in optional.items() if value}]


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
        """Return about how many characters the rendered text has without tools, or a lower bound above a million."""
        if len(self.messages) > MANY or any(not isinstance(value, SCALARS) for value in self.template_kwargs.values()):
            return 1 << 20
        return json_size(self.template_kwargs) + sum(message.size for message in self.messages)
