"""A `MessagesBody` is the body of Anthropic's `/v1/messages`, and is converted to a `GenerationRequest`.

Source: the types `MessageCreateParams` of the `anthropic` client, and of its beta API. Unknown fields are refused by
name. Fields that only say where, at what price or how fast Anthropic serves a request are accepted without effect.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, SkipValidation, model_validator

from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.gateway.anthropic.tool_definition import ToolDefinition, ToolSelection, tool_use
from services.gateway.anthropic.turns import MessageTurn, MessageTurns, TextBlock, num_parts
from services.gateway.chat.thinking import Thinking
from services.gateway.errors import invalid
from services.gateway.generation_request import AnswerFormat, GenerationRequest
from services.gateway.request_body import BaseBody, Integer, only, validate

# Anthropic's error code for a server that keeps no threads (stored conversations). The tool runner of the `anthropic`
# client first asks for a thread. After an error with this code, the tool runner sends all messages instead.
THREAD_UNSUPPORTED = "thread_unsupported_request"


class ThinkingConfig(BaseBody):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> ThinkingConfig:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("must hold budget_tokens if, and only if, its type is 'enabled'")
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ValueError(f"must hold budget_tokens of at least 1, not {self.budget_tokens}")
        return self


class JsonOutputFormat(BaseBody):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseBody):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutputFormat | None = None
    task_budget: Annotated[dict[str, Any] | None, only()] = None


class ContextEdit(BaseBody):
    type: Literal["clear_thinking_20251015"]  # the chat template itself drops earlier reasoning
    keep: Any = None


class ContextManagement(BaseBody):
    edits: list[ContextEdit] | None = None


class CountTokensBody(BaseBody):
    """A `CountTokensBody` is the body of `/v1/messages/count_tokens`: all fields that decide the prompt."""

    model: str
    # `MessageTurns` checks the next two fields, in a thread if the conversation is long.
    messages: SkipValidation[list[MessageTurn]]
    system: SkipValidation[str | list[TextBlock] | None] = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolSelection | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutputFormat | None = None  # older name of output_config.format
    context_management: ContextManagement | None = None
    mcp_servers: Annotated[list[Any] | None, only([])] = None
    compaction: Annotated[dict[str, Any] | None, only()] = None
    cache_control: dict[str, Any] | None = None  # no effect: every prompt goes through the prefix cache
    speed: Literal["standard", "fast"] | None = None  # no effect
    billing_policy: dict[str, Any] | None = None  # no effect

    @model_validator(mode="after")
    def _check_formats(self) -> CountTokensBody:
        if self.output_format and self.output_config and self.output_config.format:
            raise ValueError("output_format may not be given together with output_config.format; give one.")
        return self

    @property
    def num_parts(self) -> int:
        """Return the number of messages and content blocks."""
        return num_parts(self.messages) + num_parts(self.system)

    @property
    def hides_thinking(self) -> bool:
        """Return True if the response must not show the reasoning."""
        return self.thinking is not None and self.thinking.display == "omitted"

    def request(self) -> GenerationRequest:
        """Return the request to generate the answer. Raises ApiError or ValueError if a parameter is invalid."""
        turns = validate(MessageTurns, {"messages": self.messages, "system": self.system})
        thinking = self._thinking()
        return GenerationRequest(
            turns.conversation(thinking.template_kwargs(None)),
            self.sampling(),
            answer_format=self._answer_format(),
            tool_use=tool_use(self.tools or (), self.tool_choice),
            thinking=thinking,
        )

    def sampling(self) -> dict[str, Any]:
        """Return the sampling parameters that the client set, by their names in SamplingParams."""
        return {}

    def _answer_format(self) -> AnswerFormat | None:
        format_ = self.output_format or (self.output_config.format if self.output_config else None)
        if format_ is None:
            return None
        param = "output_format" if self.output_format else "output_config.format"
        return AnswerFormat(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(format_.schema_)), f"{param}.schema")

    def _thinking(self) -> Thinking:
        """Return how the model may reason.

        Without the field `thinking` the model must not reason, because clients then expect only text.
        """
        if self.thinking is None or self.thinking.type == "disabled":
            return Thinking(enable_thinking=False)
        is_adaptive = self.thinking.type == "adaptive"
        effort = self.output_config.effort if is_adaptive and self.output_config else None
        return Thinking(effort, self.thinking.budget_tokens, True)


class MessagesBody(CountTokensBody):
    """A `MessagesBody` is the body of `/v1/messages`."""

    max_tokens: Integer
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    stream: bool | None = None
    container: Annotated[str | dict[str, Any] | None, only()] = None
    thread: dict[str, Any] | None = None
    inference_geo: Annotated[str | None, only("global")] = None
    # The following fields have no effect. `fallbacks` are for refused answers, and this server never refuses to answer.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    diagnostics: dict[str, Any] | None = None
    fallbacks: str | list[Any] | None = None
    fallback_credit_token: str | dict[str, Any] | None = None

    def request(self) -> GenerationRequest:
        if self.thread is not None:
            message = "thread must be null, because this server keeps no conversations; send all messages instead."
            raise invalid(message, "thread", THREAD_UNSUPPORTED)
        return super().request()

    def sampling(self) -> dict[str, Any]:
        names = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        names |= {"top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in names.items() if value is not None}
        return given | ({"stop": tuple(self.stop_sequences)} if self.stop_sequences else {})
