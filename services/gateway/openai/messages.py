"""A `ConversationBody` holds OpenAI's messages and tools, which are converted to `Conversation` and `Tool`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall, check_message
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.tools import Tool, parse_arguments
from services.gateway.request_body import BaseBody, only


def _join_parts(value: object) -> object:
    """Return the content of a message, with a list of text parts joined to one string.

    Raises ValueError if a part of the list is not text.
    """
    if not isinstance(value, list):
        return value
    for part in value:
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not (is_text and isinstance(part["text"], str)):
            raise ValueError('must be a string or a list of {"type": "text", "text": "..."} parts')
    return "".join(part["text"] for part in value)


class CallFunction(BaseBody):
    name: str
    arguments: str = ""


class ToolCall(BaseBody):
    id: str
    type: Literal["function"] = "function"
    function: CallFunction
    index: int | None = None  # has no effect; clients that joined the pieces of a stream may send the index back


class Message(BaseBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_join_parts)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Clients send earlier answers back with the fields below. The gateway accepts each field only if it is empty.
    refusal: Annotated[str | None, only(None)] = None
    audio: Annotated[dict[str, Any] | None, only(None)] = None
    annotations: Annotated[list[Any] | None, only([])] = None
    function_call: Annotated[dict[str, Any] | None, only(None)] = None


class ToolFunction(BaseBody):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(BaseBody):
    type: Literal["function"]
    function: ToolFunction

    def tool(self) -> Tool:
        function = self.function
        return Tool(function.name, function.description or "", function.parameters or {}, function.strict or False)


class NamedFunction(BaseBody):
    name: str


class NamedTool(BaseBody):
    type: Literal["function"]
    function: NamedFunction


class ConversationBody(BaseBody):
    """A `ConversationBody` holds the fields of a conversation, for `/v1/chat/completions` and `/tokenize`."""

    messages: list[Message]
    tools: list[ToolBody] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def thinking(self) -> Thinking:
        return Thinking(self.reasoning_effort, self.thinking_token_budget, self.enable_thinking)

    def conversation(self, add_generation_prompt: bool = True) -> Conversation:
        """Return the messages and template arguments as a `Conversation`, to which the tools are added later.

        Raises ApiError or ValueError if a message or an argument is invalid.
        """
        messages = tuple(_message(f"messages[{index}]", message) for index, message in enumerate(self.messages))
        kwargs = self.thinking.template_kwargs(self.chat_template_kwargs)
        return Conversation(messages, template_kwargs=kwargs, add_generation_prompt=add_generation_prompt)


def _message(param: str, message: Message) -> ChatMessage:
    calls = tuple(
        PastCall(
            call.id,
            call.function.name,
            parse_arguments(call.function.arguments, f"{param}.tool_calls[{n}].function.arguments"),
        )
        for n, call in enumerate(message.tool_calls or ())
    )
    fields = (message.name or "", message.reasoning_content or "", calls, message.tool_call_id or "")
    return check_message(ChatMessage(message.role, message.content, *fields), param)
