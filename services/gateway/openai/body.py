"""A `CompletionBody` or `ChatBody` is a request body of OpenAI's API, and is converted to `GenerationRequest`.

Source: OpenAI's API reference for completions and chat completions. Fields that OpenAI does not have are from vLLM,
except `timeout` and `enable_thinking`, which exist only in Expertmesh. In every field null stands for a missing field.
If a body has an unknown field, the error names the field. The fields without effect stand in `inert_fields`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from services.engine.contract.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    SamplingParams,
)
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.generation_request import AnswerFormat, GenerationRequest
from services.gateway.openai.answer_formats import ResponseFormat, StructuredOutputs
from services.gateway.openai.inert_fields import InertChatFields, InertCompletionFields, InertFields
from services.gateway.openai.messages import ConversationBody, ToolFunction
from services.gateway.openai.tool_choice import FunctionName, ToolChoice, function_use, tool_use
from services.gateway.request_body import BaseBody, Integer, shown

PromptForm = str | list[str] | list[int] | list[list[int]]  # the types before validation, for OpenAPI
StopForm = str | list[str]
MAX_PROMPTS = 64  # maximum number of prompts in one body
SAMPLING_NAMES = frozenset(SamplingParams.__dataclass_fields__) - {
    "logprobs",
    "logit_bias",
    "grammar",
    "thinking_budget",
}


def _prompts(value: object) -> list[Any]:
    """Return the prompts of `value`, which is a prompt (a string or a list of token ids) or a list of prompts.

    Raises ValueError for every other value and for more than MAX_PROMPTS prompts.
    """
    if _is_one_prompt(value):
        return [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS and all(isinstance(item, str | list) for item in value):
        raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, not {len(value)}")
    if isinstance(value, list) and value and all(_is_one_prompt(item) for item in value):
        return value
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _is_one_prompt(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(item) is int for item in value)
    return isinstance(value, str)


def _check_stop(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(f"must be a string or a list of strings, not {shown(value)}")


StopList = Annotated[list[str], BeforeValidator(_check_stop, json_schema_input_type=StopForm)]


def _check_stop_ids(value: object) -> object:
    """Return `value` if it is no list, or a list short enough to be parsed. Raises ValueError for a longer list."""
    if isinstance(value, list) and len(value) > MAX_STOP_TOKENS:
        raise ValueError(f"must be at most {MAX_STOP_TOKENS} ids, not {len(value)} ids")
    return value


StopIds = Annotated[list[Integer], BeforeValidator(_check_stop_ids)]


def _check_logit_bias(value: object) -> object:
    """Return `value` if it has few enough entries to be parsed, and only numbers; the gateway's limit is checked later.

    Raises ValueError for the first value that is no number.
    """
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must hold at most {MAX_LOGIT_BIAS} entries, not {len(value)}")
    for key, bias in value.items() if isinstance(value, dict) else ():
        if type(bias) not in (int, float):
            raise ValueError(f"must hold a number for each token id, not {shown(bias)} for {key!r:.100}")
    return value


BiasByToken = Annotated[dict[str, float], BeforeValidator(_check_logit_bias)]


class StreamOptions(BaseBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # has no effect: chunks are never padded


class _RequestBody(InertFields):
    """A `_RequestBody` holds the fields that are common to completions and chat completions."""

    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: StopList | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: StopIds | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = None
    n: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: BiasByToken | None = None
    prompt_logprobs: Integer | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Integer | None = None
    cache_salt: str | None = None
    priority: Integer | None = None
    timeout: float | None = None

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
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def returns_token_ids(self) -> bool:
        return self.return_token_ids is True

    @property
    def include_usage_in_chunks(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats is True

    def parameters(self) -> dict[str, Any]:
        """Return the fields of a `GenerationRequest` that completions and chats have in common."""
        return {
            "n": self.n,
            "answer_format": self.answer_format(),
            "timeout": self.timeout,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
            "skip_special_tokens": self.skip_special_tokens is not False,
            "include_stop_str_in_output": self.include_stop_str_in_output is True,
        }

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


class CompletionBody(InertCompletionFields, _RequestBody):
    """A `CompletionBody` is the body of a request to `/v1/completions`."""

    prompt: Annotated[Any, BeforeValidator(_prompts, json_schema_input_type=PromptForm)]
    best_of: Integer | None = None
    echo: bool | None = None
    logprobs: Integer | None = None

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
        sampling, parameters = self.sampling(self.logprobs), self.parameters()
        if self.echoes_logprobs:
            sampling.setdefault("prompt_logprobs", self.logprobs)
        first, *more = self.prompt
        return GenerationRequest(first, sampling, echo=self.echo is True, more_prompts=more, **parameters)


class ChatBody(ConversationBody, InertChatFields, _RequestBody):
    """A `ChatBody` is the body of a request to `/v1/chat/completions`."""

    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[ToolFunction] | None = None  # `tools` and `tool_choice` of OpenAI's older API
    function_call: str | FunctionName | None = None
    include_reasoning: bool | None = None  # False: the response leaves the reasoning out

    @model_validator(mode="after")
    def _check_chat(self) -> ChatBody:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens must be equal if both are given; set only one.")
        self.max_tokens = limits.pop() if limits else None
        if self.functions and self.tools:
            raise ValueError("functions may not be given together with tools; give tools only.")
        if self.function_call not in (None, "none") and not self.functions:
            raise ValueError("function_call may only be given together with functions.")
        if self.functions and self.tool_choice is not None:
            raise ValueError("tool_choice may not be given together with functions; give function_call or tools.")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs may only be given together with logprobs=true.")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise ValueError(f"top_logprobs must be 0 to {MAX_LOGPROBS}, not {self.top_logprobs}.")
        return self

    @property
    def is_chat(self) -> bool:
        return True

    @property
    def calls_functions(self) -> bool:
        """Return True if the response must have the form of OpenAI's older API with `functions`."""
        return bool(self.functions)

    def offered_tools(self) -> tuple[Tool, ...]:
        return (*super().offered_tools(), *(function.tool() for function in self.functions or ()))

    def _tool_use(self) -> ToolUse:
        if self.functions:
            return function_use(self.offered_tools(), self.function_call)
        return tool_use(self.offered_tools(), self.tool_choice, self.parallel_tool_calls)

    def request(self) -> GenerationRequest:
        """Return the `GenerationRequest` for the conversation of the body.

        Raises ApiError or ValueError if a parameter is invalid.
        """
        sampling = self.sampling((self.top_logprobs or 0) if self.logprobs else None)
        conversation, parameters = self.conversation(), self.parameters()
        use = self._tool_use()
        return GenerationRequest(conversation, sampling, tool_use=use, thinking=self.thinking, **parameters)


Body = CompletionBody | ChatBody
