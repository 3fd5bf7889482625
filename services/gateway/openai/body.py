"""A `CompletionBody` or `ChatBody` is a request body of OpenAI's API, and is converted to `GenerationRequest`.

Source: OpenAI's API reference for completions and chat completions. Fields from vLLM are `top_k`, `min_p`,
`repetition_penalty`, `stop_token_ids`, `ignore_eos`, `min_tokens`, `prompt_logprobs`, `priority`,
`structured_outputs` and `chat_template_kwargs`; the bodies of `/tokenize` and `/detokenize` are from vLLM, too. The
fields `timeout` and `enable_thinking` exist only in Expertmesh. If a body has an unknown field, the error names the
field.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from services.engine.contract.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, Grammar, GrammarKind, SamplingParams
from services.gateway.chat import grammars
from services.gateway.chat.tools import ToolUse, parse_tool_mode
from services.gateway.generation_request import AnswerFormat, GenerationRequest
from services.gateway.openai.messages import ConversationBody, NamedTool
from services.gateway.request_body import BaseBody, only

MAX_PROMPTS = 64  # maximum number of prompts in one body
SAMPLING_NAMES = frozenset(SamplingParams.__dataclass_fields__) - {
    "logprobs",
    "logit_bias",
    "grammar",
    "thinking_budget",
}


def _check_prompt(value: object) -> object:
    """Return `value` if it is a prompt (a string or a list of token ids) or a list of prompts.

    Raises ValueError for every other value and for more than MAX_PROMPTS prompts.
    """
    if _is_one_prompt(value):
        return value
    if isinstance(value, list) and value and all(_is_one_prompt(item) for item in value):
        if len(value) <= MAX_PROMPTS:
            return value
        raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, not {len(value)}")
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _is_one_prompt(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(item) is int for item in value)
    return isinstance(value, str)


def _check_stop(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError(f"must be a string or a list of strings, not {value!r:.100}")


def _check_bias(value: object) -> object:
    """Return `value` if it has few enough entries to be parsed; the gateway's own limit is checked later."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must hold at most {MAX_LOGIT_BIAS} entries, not {len(value)}")
    return value


class StreamOptions(BaseBody):
    include_usage: bool = False


class StructuredOutputs(BaseBody):
    """A `StructuredOutputs` holds the format that the answer must match; the client must set exactly one field.

    The fields are the same as in vLLM's API.
    """

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("must hold exactly one of json, json_object, regex, choice and grammar")
        return self

    def answer_format(self) -> AnswerFormat:
        param = "structured_outputs"
        if self.json_ is not None:
            schema = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            return AnswerFormat(Grammar(GrammarKind.JSON_SCHEMA, schema), f"{param}.json")
        if self.regex is not None:
            return AnswerFormat(Grammar(GrammarKind.REGEX, self.regex), f"{param}.regex")
        if self.choice is not None:
            return AnswerFormat(grammars.any_of(self.choice), f"{param}.choice")
        if self.grammar is not None:
            return AnswerFormat(Grammar(GrammarKind.LARK, self.grammar), f"{param}.grammar")
        return AnswerFormat(Grammar(GrammarKind.JSON_OBJECT), f"{param}.json_object")


class JsonSchema(BaseBody):
    name: str | None = None
    description: str | None = None  # the description is accepted but has no effect
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None  # the field has no effect, because every schema is enforced


class ResponseFormat(BaseBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("must hold a json_schema if, and only if, its type is 'json_schema'")
        return self

    def answer_format(self) -> AnswerFormat | None:
        param = "response_format"
        if self.json_schema is not None:
            schema = json.dumps(self.json_schema.schema_)
            return AnswerFormat(Grammar(GrammarKind.JSON_SCHEMA, schema), f"{param}.json_schema.schema")
        return AnswerFormat(Grammar(GrammarKind.JSON_OBJECT), param) if self.type == "json_object" else None


class _RequestBody(BaseBody):
    """A `_RequestBody` holds the fields that are common to completions and chat completions."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_check_stop)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_check_bias)] = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timeout: float | None = None
    user: str | None = None  # `user`, `metadata` and `store` are accepted but have no effect
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> _RequestBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options may only be given together with stream=true.")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs may only be given without stream=true.")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise ValueError("structured_outputs may not be given together with response_format; give one.")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def answer_format(self) -> AnswerFormat | None:
        if self.structured_outputs is not None:
            return self.structured_outputs.answer_format()
        return self.response_format.answer_format() if self.response_format else None

    def sampling(self, num_logprobs: int | None) -> dict[str, Any]:
        """Return the sampling parameters that the client set, by their names in SamplingParams.

        `num_logprobs` is the requested number of alternatives for each token; None if the client asked for no logprobs.
        """
        given = self.model_dump(include=set(SAMPLING_NAMES), exclude_none=True)
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        if num_logprobs is not None:
            given["logprobs"] = num_logprobs
        if self.logit_bias:
            given["logit_bias"] = self.logit_bias
        return given


class CompletionBody(_RequestBody):
    """A `CompletionBody` is the body of a request to `/v1/completions`."""

    prompt: Annotated[Any, BeforeValidator(_check_prompt)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Annotated[str | None, only(None)] = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of must be equal to n ({self.n or 1}), because answers are not ranked.")
        return self

    @property
    def is_chat(self) -> bool:
        return False

    @property
    def echoes_logprobs(self) -> bool:
        """Return True if the response lists the logprobs of the prompt's tokens before the logprobs of the answer."""
        return bool(self.echo) and self.logprobs is not None

    def request(self) -> GenerationRequest:
        """Return the `GenerationRequest` for all prompts of the body.

        Raises ApiError or ValueError if a parameter is invalid.
        """
        sampling, answer_format = self.sampling(self.logprobs), self.answer_format()
        if self.echoes_logprobs:
            sampling.setdefault("prompt_logprobs", self.logprobs)
        first, *more = [self.prompt] if _is_one_prompt(self.prompt) else self.prompt
        return GenerationRequest(
            first, sampling, self.n, self.echo or False, answer_format, timeout=self.timeout, more_prompts=more
        )


class ChatBody(ConversationBody, _RequestBody):
    """A `ChatBody` is the body of a request to `/v1/chat/completions`."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens must be equal if both are given; set only one.")
        self.max_tokens = limits.pop() if limits else None
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs may only be given together with logprobs=true.")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise ValueError(f"top_logprobs must be 0 to {MAX_LOGPROBS}, not {self.top_logprobs}.")
        return self

    @property
    def is_chat(self) -> bool:
        return True

    def request(self) -> GenerationRequest:
        """Return the `GenerationRequest` for the conversation of the body.

        Raises ApiError or ValueError if a parameter is invalid.
        """
        choice = self.tool_choice
        function = choice.function.name if isinstance(choice, NamedTool) else None
        mode = parse_tool_mode(choice) if isinstance(choice, str) else None
        tools = tuple(tool.tool() for tool in self.tools or ())
        tool_use = ToolUse.of(tools, mode, function, self.parallel_tool_calls)
        sampling = self.sampling((self.top_logprobs or 0) if self.logprobs else None)
        return GenerationRequest(
            self.conversation(),
            sampling,
            self.n,
            answer_format=self.answer_format(),
            tool_use=tool_use,
            timeout=self.timeout,
            thinking=self.thinking,
        )


class TokenizeBody(BaseBody):
    """A `TokenizeBody` is the body of a request to `/tokenize` with a prompt that is a string."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False

    def request(self) -> GenerationRequest:
        """Return a `GenerationRequest` that holds only the prompt to tokenize."""
        return GenerationRequest(self.prompt)


class TokenizeChatBody(ConversationBody):
    """A `TokenizeChatBody` is the body of a request to `/tokenize` with a conversation."""

    model: str | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    return_token_strs: bool = False

    def request(self) -> GenerationRequest:
        """Return a `GenerationRequest` that holds only the conversation to tokenize and its tools.

        Raises ApiError or ValueError if the conversation is invalid.
        """
        return GenerationRequest(
            self.conversation(self.add_generation_prompt),
            tool_use=ToolUse(tuple(tool.tool() for tool in self.tools or ())),
        )


class DetokenizeBody(BaseBody):
    """A `DetokenizeBody` is the body of a request to `/detokenize`."""

    model: str | None = None
    tokens: list[int]


Body = CompletionBody | ChatBody


def is_chat(data: bytes) -> bool:
    """Return True if `data`, the body of a request to `/tokenize`, holds a conversation."""
    try:
        body = json.loads(data)
    except ValueError:
        return False
    return isinstance(body, dict) and "messages" in body
