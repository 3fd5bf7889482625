"""A `ConversationBody` holds OpenAI's messages and tools, which are converted to `Conversation` and `Tool`.

Clients send messages of earlier answers back unchanged, with all fields that their library, this server or another
server added. Such a field has no effect.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall, check_message
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.tools import Tool, parse_arguments
from services.gateway.openai.content import Content, text_of, thinking_of
from services.gateway.request_body import BaseBody, Integer, LenientBody, only


def _arguments_text(value: object) -> object:
    """Return the arguments of a call as text; some clients send them as an object, or null if there are none."""
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, dict) else value


class CallFunction(LenientBody):
    name: str
    arguments: Annotated[str, BeforeValidator(_arguments_text)] = ""


class ToolCall(LenientBody):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CallFunction


class Message(LenientBody):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name; reasoning_content has precedence if both are given
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CallFunction | None = None  # a call of OpenAI's older API, which has no id
    audio: Annotated[dict[str, Any] | None, only()] = None

    def chat_message(self, param: str) -> ChatMessage:
        """Return the message in the form that the chat template needs. Raises ValueError if fields do not fit.

        `param` is the name of the client's parameter that holds the message, for the error message.
        """
        content = text_of(self.content)
        reasoning = self.reasoning_content or self.reasoning or thinking_of(self.content)
        role, call_id = self.role, self.tool_call_id or ""
        if role == "function":
            # OpenAI's older API has no call ids, so the function's name serves as the id, here and in `_past_calls`.
            role, call_id = "tool", self.name or ""
        calls = self._past_calls(param)
        message = ChatMessage(
            role, self.refusal if content is None else content, self.name or "", reasoning, calls, call_id
        )
        return check_message(message, param)

    def _past_calls(self, param: str) -> tuple[PastCall, ...]:
        calls = [
            (f"{param}.tool_calls[{n}]", call.id or "", call.function) for n, call in enumerate(self.tool_calls or ())
        ]
        if self.function_call is not None:
            calls.append((param + ".function_call", self.function_call.name, self.function_call))
        return tuple(
            PastCall(id_, function.name, parse_arguments(function.arguments, f"{path}.function.arguments"))
            for path, id_, function in calls
        )


class ToolFunction(BaseBody):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None  # a hint of vLLM's API

    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters or {}, self.strict or False)


class ToolBody(BaseBody):
    type: Literal["function"]
    function: ToolFunction
    cache_control: dict[str, Any] | None = None  # hints of Anthropic's and vLLM's APIs
    defer_loading: bool | None = None


class ConversationBody(BaseBody):
    """A `ConversationBody` holds the fields of a conversation, for `/v1/chat/completions` and `/tokenize`."""

    messages: list[Message]
    tools: list[ToolBody] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    thinking_token_budget: Integer | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None  # None: true, unless the final message is continued
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_final_message(self) -> ConversationBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message may not be true together with add_generation_prompt.")
        return self

    @property
    def thinking(self) -> Thinking:
        return Thinking(self.reasoning_effort, self.thinking_token_budget, self.enable_thinking)

    def offered_tools(self) -> tuple[Tool, ...]:
        return tuple(tool.function.tool() for tool in self.tools or ())

    def conversation(self) -> Conversation:
        """Return the messages and template arguments as a `Conversation`, to which the tools are added later.

        Raises ApiError or ValueError if a message or an argument is invalid.
        """
        is_continued = self.continue_final_message is True
        return Conversation(
            tuple(message.chat_message(f"messages[{index}]") for index, message in enumerate(self.messages)),
            template_kwargs=self.thinking.template_kwargs(self.chat_template_kwargs),
            add_generation_prompt=not is_continued
            if self.add_generation_prompt is None
            else self.add_generation_prompt,
            continue_final_message=is_continued,
        )
