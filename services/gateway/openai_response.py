"""OpenAI's responses, built from the `openai` package's own types.

Source: OpenAI's API reference for completions and chat completions; `reasoning_content` and `prompt_logprobs` are in
vLLM's shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from services.gateway.answer import Scored, TextDelta
from services.gateway.generation import Tally
from services.gateway.splitter import CallDelta


@dataclass(frozen=True)
class Head:
    """What every response to one request repeats."""

    id: str
    created: int
    model: str

    def fields(self, object_: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_, "created": self.created, "model": self.model}


def usage_of(tally: Tally) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        total_tokens=tally.prompt_tokens + tally.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=tally.cached_tokens),
    )


def cache_header(delta: TextDelta) -> dict[str, str]:
    """What the prefix cache did for a request, and why no more."""
    return {"X-Expertmesh-Cache": delta.cache_report}


def completion(head: Head, choices: Sequence[TextDelta], usage: CompletionUsage, echo: bool, tell_prompt: bool) -> str:
    """JSON of a whole answer. `echo`: the prompts' logprobs stand before the answers' own."""
    listed = [_completion_choice(choice, echo, tell_prompt) for choice in choices]
    return _dump(Completion.model_construct(**head.fields("text_completion"), choices=listed, usage=usage))


def completion_chunk(head: Head, delta: TextDelta, echo: bool) -> str:
    choice = _completion_choice(delta, echo, tell_prompt=False)
    return _dump(Completion.model_construct(**head.fields("text_completion"), choices=[choice]))


def chat_completion(head: Head, choices: Sequence[TextDelta], usage: CompletionUsage, tell_prompt: bool) -> str:
    fields = {**head.fields("chat.completion"), "choices": [_chat_choice(choice) for choice in choices], "usage": usage}
    if tell_prompt:
        fields["prompt_logprobs"] = _prompt_logprobs(choices[0].prompt_logprobs)
    return _dump(ChatCompletion.model_construct(**fields))


def chat_chunk(head: Head, delta: TextDelta) -> str:
    fields: dict[str, Any] = {}
    if delta.text:
        fields["content"] = delta.text
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.calls:
        fields["tool_calls"] = [_call_delta(call) for call in delta.calls]
    return _chat_chunk(head, delta.index, fields, delta.finish_reason, _chat_logprobs(delta.logprobs))


def role_chunk(head: Head, index: int) -> str:
    """Each choice of a chat stream opens with the role of the speaker."""
    return _chat_chunk(head, index, {"role": "assistant", "content": ""}, None, None)


def usage_chunk(head: Head, usage: CompletionUsage, is_chat: bool) -> str:
    """The last chunk of a stream that was asked for its usage: no choice, only the numbers."""
    if is_chat:
        return _dump(ChatCompletionChunk(**head.fields("chat.completion.chunk"), choices=[], usage=usage))
    return _dump(Completion(**head.fields("text_completion"), choices=[], usage=usage))


def _chat_chunk(head: Head, index: int, delta: dict[str, Any], finish_reason: str | None, logprobs: Any) -> str:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    fields = head.fields("chat.completion.chunk")
    return _dump(ChatCompletionChunk.model_construct(**fields, choices=[cast(Any, choice)]))


def _completion_choice(delta: TextDelta, echo: bool, tell_prompt: bool) -> CompletionChoice:
    scores = [*(delta.prompt_logprobs if echo else ()), *delta.logprobs]
    fields: dict[str, Any] = {"index": delta.index, "text": delta.text, "logprobs": _completion_logprobs(scores)}
    if tell_prompt:
        fields["prompt_logprobs"] = _prompt_logprobs(delta.prompt_logprobs)
    # Constructed unchecked: the type knows no null finish reason, which every chunk but the last has.
    return CompletionChoice.model_construct(**fields, finish_reason=cast(Any, delta.finish_reason))


def _chat_choice(delta: TextDelta) -> Any:
    message: dict[str, Any] = {"role": "assistant", "content": delta.text}
    if delta.reasoning:
        message["reasoning_content"] = delta.reasoning
    if delta.calls:
        calls = [_call_delta(call) for call in delta.calls]
        message |= {"content": delta.text or None, "tool_calls": [{k: c[k] for k in c if k != "index"} for c in calls]}
    logprobs = _chat_logprobs(delta.logprobs)
    return {"index": delta.index, "message": message, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _completion_logprobs(scores: Sequence[Scored]) -> dict[str, Any] | None:
    if not scores:
        return None
    return {
        "tokens": [_name(score) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [None if score.logprob is None else _by_name([score, *score.top]) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _by_name(scores: Iterable[Scored]) -> dict[str, float]:
    """The token itself is always among them, as OpenAI has it."""
    return {_name(score): score.logprob or 0.0 for score in scores}


def _name(score: Scored) -> str:
    """Half a character's bytes are written out, as OpenAI does, so that different tokens have different names."""
    if "\ufffd" in score.text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.data)
    return score.text


def _chat_logprobs(scores: Sequence[Scored]) -> dict[str, Any] | None:
    if not scores:
        return None
    content = [{**_chat_score(score), "top_logprobs": list(map(_chat_score, score.top))} for score in scores]
    return {"content": content, "refusal": None}


def _chat_score(score: Scored) -> dict[str, Any]:
    return {"token": score.text, "logprob": score.logprob, "bytes": list(score.data)}


def _prompt_logprobs(scores: Sequence[Scored]) -> list[dict[str, Any] | None]:
    """vLLM's shape: by token id, the prompt's own token among them; null for the first."""
    return [
        None if score.logprob is None else {str(one.token_id): _ranked(one, rank) for one, rank in _ranks(score)}
        for score in scores
    ]


def _ranks(score: Scored) -> Iterable[tuple[Scored, int]]:
    others = [(one, rank) for rank, one in enumerate(score.top, 1) if one.token_id != score.token_id]
    return [(score, score.rank), *others]


def _ranked(score: Scored, rank: int) -> dict[str, Any]:
    return {"logprob": score.logprob, "rank": rank, "decoded_token": score.text}


def _dump(model: BaseModel) -> str:
    return model.model_dump_json(exclude_unset=True, warnings=False)
