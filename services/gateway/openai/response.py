"""`completion`, `chat_completion` and their chunk functions format responses as JSON, as in OpenAI's API.

Source: OpenAI's API reference for completions and chat completions. `reasoning_content` and `prompt_logprobs` have the
format of vLLM's API. Responses are built from plain dictionaries, because building the types of the `openai` package
takes 150 µs for every token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.gateway.chat.answer_parser import ToolCallDelta
from services.gateway.chat.text_delta import ScoredToken, TextDelta
from services.gateway.chat.token_usage import TokenUsage

COMPLETION, CHAT, CHAT_CHUNK = "text_completion", "chat.completion", "chat.completion.chunk"

ENCODE = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class ResponseHead:
    """A `ResponseHead` holds the fields that are the same in every chunk of the response to one request."""

    id: str
    created: int
    model: str

    def with_choices(self, object_: str, choices: list[dict[str, Any]], **more: Any) -> str:
        fields = {"id": self.id, "object": object_, "created": self.created, "model": self.model, "choices": choices}
        return ENCODE(fields | more)


def _usage(usage: TokenUsage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def completion(
    head: ResponseHead,
    choices: Sequence[TextDelta],
    usage: TokenUsage,
    echo: bool,
    has_prompt_logprobs: bool,
    has_ids: bool,
) -> str:
    """Return the JSON of a complete response to `/v1/completions`.

    - `echo`: True if the logprobs of a prompt's tokens are listed before the logprobs of the answer's tokens.
    - `has_prompt_logprobs`: True if each choice gets the field `prompt_logprobs` of vLLM's API.
    - `has_ids`: True if each choice gets the fields `prompt_token_ids` and `token_ids` of vLLM's API.
    """
    listed = [_completion_choice(choice, echo, has_ids) for choice in choices]
    if has_prompt_logprobs:
        for choice, delta in zip(listed, choices, strict=True):
            choice["prompt_logprobs"] = _prompt_logprobs(delta.prompt_logprobs)
    return head.with_choices(COMPLETION, listed, usage=_usage(usage))


def completion_chunk(head: ResponseHead, delta: TextDelta, echo: bool, has_ids: bool) -> str:
    return head.with_choices(COMPLETION, [_completion_choice(delta, echo, has_ids)])


def chat_completion(
    head: ResponseHead, choices: Sequence[TextDelta], usage: TokenUsage, has_prompt_logprobs: bool, has_ids: bool
) -> str:
    prompt = {"prompt_logprobs": _prompt_logprobs(choices[0].prompt_logprobs)} if has_prompt_logprobs else {}
    prompt |= _prompt_ids(choices[0], has_ids)
    listed = [_chat_choice(choice) | _ids(choice, has_ids) for choice in choices]
    return head.with_choices(CHAT, listed, usage=_usage(usage), **prompt)


def chat_chunk(head: ResponseHead, delta: TextDelta, has_ids: bool) -> str:
    fields: dict[str, Any] = {}
    if delta.text:
        fields["content"] = delta.text
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.calls:
        fields["tool_calls"] = [{"index": call.index, **_call(call)} for call in delta.calls]
    choice = _choice(delta, "delta", fields, _chat_logprobs(delta.logprobs)) | _ids(delta, has_ids)
    return head.with_choices(CHAT_CHUNK, [choice])


def role_chunk(head: ResponseHead, first: TextDelta, has_ids: bool) -> str:
    """Return the first chunk of a choice in a chat stream, which holds the role "assistant" and comes before `first`.

    If `has_ids` is True, the chunk has the field `prompt_token_ids` of vLLM's API.
    """
    fields = {"role": "assistant", "content": ""}
    choice = {"index": first.index, "delta": fields, "logprobs": None, "finish_reason": None}
    return head.with_choices(CHAT_CHUNK, [choice], **_prompt_ids(first, has_ids))


def _prompt_ids(delta: TextDelta, has_ids: bool) -> dict[str, Any]:
    return {"prompt_token_ids": delta.prompt_token_ids} if has_ids and delta.prompt_token_ids else {}


def _ids(delta: TextDelta, has_ids: bool) -> dict[str, Any]:
    return {"token_ids": delta.token_ids} if has_ids else {}


def usage_chunk(head: ResponseHead, usage: TokenUsage, is_chat: bool) -> str:
    """Return the last chunk of a stream with `include_usage`, which holds the token usage and no choices."""
    return head.with_choices(CHAT_CHUNK if is_chat else COMPLETION, [], usage=_usage(usage))


def _choice(delta: TextDelta, key: str, value: Any, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": delta.index, key: value, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def _completion_choice(delta: TextDelta, echo: bool, has_ids: bool) -> dict[str, Any]:
    scores = [*(delta.prompt_logprobs if echo else ()), *delta.logprobs]
    choice = _choice(delta, "text", delta.text, _completion_logprobs(scores))
    return choice | _prompt_ids(delta, has_ids) | _ids(delta, has_ids)


def _chat_choice(delta: TextDelta) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": delta.text}
    if delta.reasoning:
        message["reasoning_content"] = delta.reasoning
    if delta.calls:
        message |= {"content": delta.text or None, "tool_calls": [_call(call) for call in delta.calls]}
    return _choice(delta, "message", message, _chat_logprobs(delta.logprobs))


def _call(call: ToolCallDelta) -> dict[str, Any]:
    if not call.id:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _completion_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any] | None:
    if not scores:
        return None
    return {
        "tokens": [_name(score) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [None if score.logprob is None else _by_name([score, *score.top]) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _by_name(scores: Iterable[ScoredToken]) -> dict[str, float | None]:
    """Return a mapping from the text of each token in `scores` to the token's logprob."""
    return {_name(score): score.logprob for score in scores}


def _name(score: ScoredToken) -> str:
    """Return the text of a token, or its bytes in hexadecimal if the bytes are not complete characters.

    The format "bytes:\\x.." is the format of OpenAI's API. Without the hexadecimal digits, all tokens of incomplete
    characters would have the same name, U+FFFD.
    """
    if "\ufffd" in score.text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.data)
    return score.text


def _chat_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any] | None:
    if not scores:
        return None
    content = [{**_chat_score(score), "top_logprobs": list(map(_chat_score, score.top))} for score in scores]
    return {"content": content, "refusal": None}


def _chat_score(score: ScoredToken) -> dict[str, Any]:
    return {"token": score.text, "logprob": score.logprob, "bytes": list(score.data)}


def _prompt_logprobs(scores: Sequence[ScoredToken]) -> list[dict[str, Any] | None]:
    """Return the logprobs of the prompt's tokens in vLLM's format.

    The list holds None for the first token and one object for each later token. An object has one entry for the
    prompt's token and one for each alternative. The key of an entry is the token id; the value holds the logprob, rank
    and text of the token.
    """
    return [
        None if score.logprob is None else {str(one.token_id): _ranked(one, rank) for one, rank in _ranks(score)}
        for score in scores
    ]


def _ranks(score: ScoredToken) -> Iterable[tuple[ScoredToken, int]]:
    """Return the pair (token, rank) for the prompt's token `score` and for each of its alternatives.

    The most probable token has rank 1.
    """
    others = [(one, rank) for rank, one in enumerate(score.top, 1) if one.token_id != score.token_id]
    return [(score, score.rank), *others]


def _ranked(score: ScoredToken, rank: int) -> dict[str, Any]:
    return {"logprob": score.logprob, "rank": rank, "decoded_token": score.text}
