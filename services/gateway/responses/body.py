"""A `ResponsesBody` is the body of a request to `/v1/responses`, and is converted to `GenerationRequest`.

Source: OpenAI's API reference for responses. vLLM's fields for sampling are the same as in chat completions.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.gateway.chat.conversation import ChatMessage, Conversation
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.generation_request import AnswerFormat, GenerationRequest
from services.gateway.openai.answer_formats import StructuredOutputs
from services.gateway.openai.body import SAMPLING_NAMES, BiasByToken, StopIds, StopList
from services.gateway.openai.tool_choice import ToolChoice, tool_use
from services.gateway.request_body import BaseBody, Integer, Metadata, only

LOGPROBS, ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
# Values of `include` for items that this server never makes; they have no effect.
OTHER_INCLUDES = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
Verbosity = Literal["low", "medium", "high"]
SummaryStyle = Literal["auto", "concise", "detailed"]
# patterns for parameter names in errors from other parts of the gateway, and the names in this API
PARAM_NAMES = {
    "logprobs": "top_logprobs",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    r"(tools\[\d+\])\.function": r"\1",
}


def _check_tool_type(value: object) -> object:
    if value != "function":
        raise ValueError(f"must be 'function', because the server has no built-in tools, not {value!r:.100}")
    return value


def _check_include(value: object) -> object:
    allowed = sorted((LOGPROBS, ENCRYPTED, *OTHER_INCLUDES))
    if value not in allowed:
        raise ValueError(f"must be one of {', '.join(map(repr, allowed))}, not {value!r:.100}")
    return value


class FunctionToolBody(BaseBody):
    """A `FunctionToolBody` is a function that the model may call; the fields without a comment have an effect."""

    type: Annotated[str, BeforeValidator(_check_tool_type)]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[str] | None = None  # accepted but has no effect
    defer_loading: bool | None = None  # accepted but has no effect, because every tool is always shown to the model
    output_schema: dict[str, Any] | None = None  # accepted but has no effect

    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters or {}, self.strict or False)

    def echo(self) -> dict[str, Any]:
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict or False,
        }


class TextFormat(BaseBody):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None  # the description is accepted but has no effect
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None  # the field has no effect, because every schema is enforced

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("must hold a schema if, and only if, its type is 'json_schema'")
        return self

    def answer_format(self) -> AnswerFormat | None:
        if self.schema_ is not None:
            return AnswerFormat(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(self.schema_)), "text.format.schema")
        return AnswerFormat(Grammar(GrammarKind.JSON_OBJECT), "text.format") if self.type == "json_object" else None

    def echo(self) -> dict[str, Any]:
        if self.schema_ is None:
            return {"type": self.type}
        named = {"name": self.name or "answer", "description": self.description}
        return {"type": self.type, **named, "schema": self.schema_, "strict": self.strict or False}


class TextConfig(BaseBody):
    format: TextFormat | None = None
    verbosity: Verbosity | None = None  # has no effect


class ReasoningConfig(BaseBody):
    """A `ReasoningConfig` says how long the model may reason; its reasoning is always shown whole, not as a summary."""

    effort: str | None = None
    summary: SummaryStyle | None = None  # has no effect
    generate_summary: SummaryStyle | None = None  # has no effect
    context: Annotated[str | None, only("auto", "current_turn")] = None  # the chat template decides
    mode: Annotated[str | None, only("standard")] = None


class ResponseStreamOptions(BaseBody):
    include_obfuscation: bool | None = None  # has no effect; the stream is not obfuscated


class ResponsesBody(BaseBody):
    """A `ResponsesBody` holds one request; fields that have no effect are marked as hints."""

    input: Any = None  # checked by `parse_items`
    instructions: str | None = None
    previous_response_id: str | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    include: list[Annotated[str, BeforeValidator(_check_include)]] | None = None
    max_output_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Integer | None = None
    tools: list[FunctionToolBody] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None

    max_tool_calls: Integer | None = None  # a hint here, because the limit is on calls of built-in tools
    user: str | None = None  # hints, from here to `prompt_cache_options`
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None

    background: Annotated[bool | None, only(False)] = None
    context_management: Annotated[list[Any] | None, only([])] = None
    conversation: Annotated[Any, only()] = None
    moderation: Annotated[dict[str, Any] | None, only()] = None
    prompt: Annotated[dict[str, Any] | None, only()] = None

    # fields of vLLM's API that would change the answer
    enable_response_messages: Annotated[bool | None, only(False)] = None
    mm_processor_kwargs: Annotated[dict[str, Any] | None, only({})] = None
    previous_input_messages: Annotated[list[Any] | None, only([])] = None
    previous_response: Annotated[dict[str, Any] | None, only()] = None
    request_id: Annotated[str | None, only()] = None  # nobody may choose the id under which a response is stored
    vllm_xargs: Annotated[dict[str, Any] | None, only({})] = None

    # vLLM's and Expertmesh's own fields
    stop: StopList | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: BiasByToken | None = None
    priority: Integer | None = None
    cache_salt: str | None = None
    timeout: float | None = None
    thinking_token_budget: Integer | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_form(self) -> ResponsesBody:
        form = self.text.format if self.text else None
        if self.structured_outputs and form and form.type != "text":
            raise ValueError("structured_outputs may not be given together with text.format; give one.")
        return self

    @property
    def has_logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def has_encrypted(self) -> bool:
        return ENCRYPTED in (self.include or ())

    def request(self, messages: tuple[ChatMessage, ...]) -> GenerationRequest:
        """Return a `GenerationRequest` with the conversation `messages`.

        Raises ValueError if a parameter is invalid.
        """
        thinking = Thinking(
            self.reasoning.effort if self.reasoning else None, self.thinking_token_budget, self.enable_thinking
        )
        return GenerationRequest(
            Conversation(messages, template_kwargs=thinking.template_kwargs(self.chat_template_kwargs)),
            self._sampling(),
            answer_format=self._answer_format(),
            tool_use=self._tool_use(),
            timeout=self.timeout,
            thinking=thinking,
            skip_special_tokens=self.skip_special_tokens is not False,
            include_stop_str_in_output=self.include_stop_str_in_output is True,
        )

    def _answer_format(self) -> AnswerFormat | None:
        if self.structured_outputs is not None:
            return self.structured_outputs.answer_format()
        return self.text.format.answer_format() if self.text and self.text.format else None

    def _sampling(self) -> dict[str, Any]:
        given = self.model_dump(include={*SAMPLING_NAMES, "logit_bias"}, exclude_none=True)
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        if self.has_logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def _tool_use(self) -> ToolUse:
        tools = tuple(tool.tool() for tool in self.tools or ())
        if tools:
            return tool_use(tools, self.tool_choice, self.parallel_tool_calls)
        # Clients send "auto" and `parallel_tool_calls` even if they offer no tools.
        return tool_use((), None if self.tool_choice == "auto" else self.tool_choice, None)

    def echo(self) -> dict[str, Any]:
        """Return the fields of the request that a response repeats, with OpenAI's defaults."""
        text, reasoning, choice = self.text or TextConfig(), self.reasoning or ReasoningConfig(), self.tool_choice
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.is_stored,
            "temperature": self.temperature,
            "text": {
                "format": text.format.echo() if text.format else {"type": "text"},
                "verbosity": text.verbosity or "medium",
            },
            "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, ToolChoice) else choice or "auto",
            "tools": [tool.echo() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }
