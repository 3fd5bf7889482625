"""A `CompletionFormat` or `ChatFormat` writes the response to one request as JSON, as in OpenAI's API.

Source: OpenAI's API reference for completions and chat completions. `reasoning`, `prompt_logprobs`, `token_ids` and
`prompt_token_ids` are from vLLM's API; `reasoning_content` is the older name of `reasoning`. Responses are built from
plain dictionaries, because building the types of the `openai` package takes 150 µs for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.gateway.chat.output_processor import TOOL_CALLS
from services.gateway.chat.text_delta import TextDelta
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.chat.tool_call_delta import ToolCallDelta
from services.gateway.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from services.gateway.schema.json_text import ENCODE, dump_parts

COMPLETION, CHAT, CHAT_CHUNK = "text_completion", "chat.completion", "chat.completion.chunk"
FUNCTION_CALL = "function_call"  # finish reason of an answer that calls one of the `functions` of OpenAI's older API


@dataclass(frozen=True)
class ResponseHead:
    """A `ResponseHead` holds the fields that are the same in every chunk of the response to one request."""

    id: str
    created: int
    model: str

    def with_choices(
        self, object_: str, choices: list[dict[str, Any]], more: dict[str, Any], is_long: bool = False
    ) -> str:
        """Return the JSON text of a response or chunk; if `is_long` is True, the text is written in parts."""
        fields = {"id": self.id, "object": object_, "created": self.created, "model": self.model, "choices": choices}
        return dump_parts(fields | more) if is_long else ENCODE(fields | more)


def usage_fields(usage: TokenUsage) -> dict[str, Any]:
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }
    }


@dataclass(frozen=True)
class CompletionFormat:
    """A `CompletionFormat` writes the response to a request of `/v1/completions`."""

    head: ResponseHead
    echo: bool = False  # True: the logprobs of a prompt's tokens are listed before the logprobs of the answer's tokens
    has_prompt_logprobs: bool = False  # True: each choice gets the field `prompt_logprobs` of vLLM's API
    has_ids: bool = False  # True: each choice gets the fields `prompt_token_ids` and `token_ids` of vLLM's API

    def whole(self, choices: Sequence[TextDelta], usage: TokenUsage) -> str:
        listed = [self._choice(choice) for choice in choices]
        if self.has_prompt_logprobs:
            for choice, delta in zip(listed, choices, strict=True):
                choice["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs)
        more = {"system_fingerprint": None, **usage_fields(usage)}
        return self.head.with_choices(COMPLETION, listed, more, is_long=True)

    def chunks(self, delta: TextDelta, is_first: bool, more: dict[str, Any]) -> list[str]:
        """Return the chunks of a stream for `delta`, with the fields `more`; `is_first` has no effect."""
        if not (delta.is_shown or (self.has_ids and delta.token_ids)):
            return []
        is_long = bool(delta.prompt_logprobs)
        return [self.head.with_choices(COMPLETION, [self._choice(delta)], more, is_long)]

    def usage_chunk(self, usage: TokenUsage) -> str:
        """Return the last chunk of a stream with `include_usage`, which holds the token usage and no choices."""
        return self.head.with_choices(COMPLETION, [], usage_fields(usage))

    def _choice(self, delta: TextDelta) -> dict[str, Any]:
        scores = [*(delta.prompt_logprobs if self.echo else ()), *delta.logprobs]
        choice = _choice(delta, "text", delta.text, completion_logprobs(scores))
        return choice | (_prompt_ids(delta) | {"token_ids": delta.token_ids} if self.has_ids else {})


@dataclass(frozen=True)
class ChatFormat:
    """A `ChatFormat` writes the response to a request of `/v1/chat/completions`."""

    head: ResponseHead
    has_prompt_logprobs: bool = False  # True: the response has the field `prompt_logprobs` of vLLM's API
    has_ids: bool = False  # True: the response has the fields `prompt_token_ids` and `token_ids` of vLLM's API
    has_reasoning: bool = True  # False: the reasoning is left out
    calls_functions: bool = False  # True: a call has the form of OpenAI's older API with `functions`

    def whole(self, choices: Sequence[TextDelta], usage: TokenUsage) -> str:
        more = {"service_tier": None, "system_fingerprint": None, **usage_fields(usage)}
        if self.has_prompt_logprobs:
            more["prompt_logprobs"] = prompt_logprobs(choices[0].prompt_logprobs)
        if self.has_ids:
            more |= _prompt_ids(choices[0])
        return self.head.with_choices(CHAT, [self._whole_choice(choice) for choice in choices], more, is_long=True)

    def chunks(self, delta: TextDelta, is_first: bool, more: dict[str, Any]) -> list[str]:
        """Return the chunks of a stream for `delta`, with the fields `more`.

        If `is_first` is True, the first chunk holds the role "assistant". The finish reason has a chunk of its own,
        because OpenAI's clients expect the delta of that chunk to be empty.
        """
        prompt = _prompt_ids(delta) if self.has_ids and is_first else {}
        encode = self.head.with_choices
        return [
            encode(CHAT_CHUNK, [choice], more | (prompt if n == 0 else {}))
            for n, choice in enumerate(self._chunk_choices(delta, is_first))
        ]

    def usage_chunk(self, usage: TokenUsage) -> str:
        """Return the last chunk of a stream with `include_usage`, which holds the token usage and no choices."""
        return self.head.with_choices(CHAT_CHUNK, [], usage_fields(usage))

    def _chunk_choices(self, delta: TextDelta, is_first: bool) -> Iterator[dict[str, Any]]:
        end, delta = replace(delta, token_ids=()), replace(delta, finish_reason=None)
        if is_first:
            yield _choice(delta, "delta", {"role": "assistant", "content": "", "refusal": None}, None)
        fields = self._delta_fields(delta)
        if fields or delta.logprobs or (self.has_ids and delta.token_ids):
            yield _choice(delta, "delta", fields, chat_logprobs(delta.logprobs)) | self._ids(delta)
        if end.finish_reason:
            yield _choice(end, "delta", {}, None) | {"finish_reason": self._reason(end)} | self._ids(end)

    def _delta_fields(self, delta: TextDelta) -> dict[str, Any]:
        fields: dict[str, Any] = {"content": delta.text} if delta.text else {}
        fields |= self._reasoning(delta)
        if delta.calls and self.calls_functions:
            fields["function_call"] = _call(delta.calls[0])["function"]
        elif delta.calls:
            fields["tool_calls"] = [{"index": call.index, **_call(call)} for call in delta.calls]
        return fields

    def _whole_choice(self, delta: TextDelta) -> dict[str, Any]:
        content = (delta.text or None) if delta.calls else delta.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, **self._reasoning(delta)}
        if delta.calls and self.calls_functions:
            message["function_call"] = _call(delta.calls[0])["function"]
        elif delta.calls:
            message["tool_calls"] = [_call(call) for call in delta.calls]
        choice = _choice(delta, "message", message, chat_logprobs(delta.logprobs))
        return choice | {"finish_reason": self._reason(delta)} | self._ids(delta)

    def _reasoning(self, delta: TextDelta) -> dict[str, str]:
        is_shown = delta.reasoning and self.has_reasoning
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning} if is_shown else {}

    def _reason(self, delta: TextDelta) -> str | None:
        is_function = self.calls_functions and delta.finish_reason == TOOL_CALLS
        return FUNCTION_CALL if is_function else delta.finish_reason

    def _ids(self, delta: TextDelta) -> dict[str, Any]:
        return {"token_ids": delta.token_ids} if self.has_ids else {}


def _prompt_ids(delta: TextDelta) -> dict[str, Any]:
    return {"prompt_token_ids": delta.prompt_token_ids} if delta.prompt_token_ids else {}


def _choice(delta: TextDelta, key: str, value: Any, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": delta.index, key: value, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def _call(call: ToolCallDelta) -> dict[str, Any]:
    if not call.id:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
