"""OpenAI's request bodies, and responses built from the `openai` package's own types.

Source: OpenAI's API reference for completions and chat completions; `top_k`, `stop_token_ids`, `ignore_eos` and
`min_tokens` are vLLM's additions. A field that is not listed here is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from services.engine.request import SamplingParams
from services.gateway.errors import ApiError, invalid
from services.gateway.generation import Prompt, TextDelta
from services.gateway.text import Chat, ChatMessage

MAX_PROMPTS = 64  # in one body
SAMPLING_NAMES = frozenset(SamplingParams.__dataclass_fields__)


def _only(*allowed: object) -> AfterValidator:
    """A field of OpenAI's that may be sent as long as it asks for nothing: any other value is refused by name."""
    values = " or ".join("null" if value is None else repr(value) for value in allowed)

    def check(value: object) -> object:
        if value is not None and value not in allowed:
            raise ValueError(f"must be {values}, because nothing else is supported yet, not {value!r:.100}")
        return value

    return AfterValidator(check)


def _check_prompt(value: object) -> object:
    """One string, one list of token ids, or a list of either."""
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


def _join_parts(value: object) -> object:
    """Content given as parts is joined, as long as every part is text."""
    if not isinstance(value, list):
        return value
    for part in value:
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not (is_text and isinstance(part["text"], str)):
            raise ValueError('must be a string or a list of {"type": "text", "text": "..."} parts')
    return "".join(part["text"] for part in value)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    include_usage: bool = False


class _RequestBody(_Body):
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_check_stop)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    user: str | None = None  # accepted and not used
    n: Annotated[int | None, _only(1)] = None
    presence_penalty: Annotated[float | None, _only(0)] = None
    frequency_penalty: Annotated[float | None, _only(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _only({})] = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> _RequestBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options may only be given together with stream=true.")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """The fields of SamplingParams that the client gave."""
        given = self.model_dump(include=set(SAMPLING_NAMES), exclude_none=True)
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


class CompletionBody(_RequestBody):
    prompt: Annotated[Any, BeforeValidator(_check_prompt)]
    best_of: Annotated[int | None, _only(1)] = None
    echo: Annotated[bool | None, _only(False)] = None
    logprobs: Annotated[int | None, _only(None)] = None
    suffix: Annotated[str | None, _only(None)] = None

    def prompts(self) -> list[Prompt]:
        return [self.prompt] if _is_one_prompt(self.prompt) else list(self.prompt)


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]
    name: str | None = None  # accepted and not used
    # What clients send back of an answer they were given, when it holds nothing.
    refusal: Annotated[str | None, _only(None)] = None
    audio: Annotated[dict[str, Any] | None, _only(None)] = None
    annotations: Annotated[list[Any] | None, _only([])] = None
    function_call: Annotated[dict[str, Any] | None, _only(None)] = None
    tool_calls: Annotated[list[Any] | None, _only([])] = None


class ChatBody(_RequestBody):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: Annotated[bool | None, _only(False)] = None
    top_logprobs: Annotated[int | None, _only(0)] = None
    response_format: Annotated[dict[str, Any] | None, _only({"type": "text"})] = None
    tools: Annotated[list[Any] | None, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> ChatBody:
        asked = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(asked) > 1:
            raise ValueError("max_tokens and max_completion_tokens must be equal where both are given; give one.")
        self.max_tokens = asked.pop() if asked else None
        return self

    def prompts(self) -> list[Prompt]:
        # "developer" is OpenAI's newer name of the system role; templates know the old one.
        roles = {"developer": "system"}
        messages = (ChatMessage(roles.get(item.role, item.role), item.content) for item in self.messages)
        return [Chat(tuple(messages))]


Body = CompletionBody | ChatBody


def parse_body(kind: type[CompletionBody] | type[ChatBody], data: bytes) -> Body:
    """Raises ApiError with one sentence about the first mistake."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _explain(kind, error.errors(include_url=False)[0]) from error


def _explain(kind: type[_RequestBody], error: ErrorDetails) -> ApiError:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    match error["type"]:
        case "json_invalid":
            return invalid(f"The body is not valid JSON: {error['ctx']['error']}.")
        case "model_type":
            return invalid(
                "The body must be a JSON object." if not path else f"{path} must be a JSON object.", path or None
            )
        case "extra_forbidden":
            allowed = _allowed_names(kind, error["loc"])
            return invalid(f"Unknown field {path!r:.100}; the allowed fields are {allowed}.", path, "unknown_parameter")
        case "missing":
            return invalid(f"{path} is missing, but required.", path)
        case "value_error":
            reason = str(error["ctx"]["error"])
            return invalid(f"{path} {reason}." if path else reason, path or reason.split()[0])
    expected = error["msg"].replace("Input should be", "must be")
    return invalid(f"{path} {expected}, not {error['input']!r:.100}.", path)


def _allowed_names(kind: type[_RequestBody], path: tuple[int | str, ...]) -> str:
    parents: dict[int | str, type[_Body]] = {"messages": Message, "stream_options": StreamOptions}
    owner = parents[path[0]] if len(path) > 1 else kind
    return ", ".join(sorted(owner.model_fields))


@dataclass(frozen=True)
class Answer:
    """What every response to one request repeats."""

    id: str
    created: int
    model: str


@dataclass
class Tally:
    """The tokens of each completion of one request, for `usage`."""

    num_prompt: dict[int, int] = field(default_factory=dict)
    num_generated: dict[int, int] = field(default_factory=dict)

    def add(self, delta: TextDelta) -> None:
        self.num_prompt[delta.index] = delta.num_prompt
        self.num_generated[delta.index] = delta.num_generated

    def usage(self) -> CompletionUsage:
        prompt, completion = sum(self.num_prompt.values()), sum(self.num_generated.values())
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def completion(answer: Answer, texts: Sequence[tuple[str, str]], usage: CompletionUsage) -> str:
    """JSON of a whole answer; `texts` holds (text, finish reason) of each prompt."""
    choices = [_completion_choice(index, text, reason) for index, (text, reason) in enumerate(texts)]
    return _dump(Completion(**_head(answer, "text_completion"), choices=choices, usage=usage))


def chat_completion(answer: Answer, texts: Sequence[tuple[str, str]], usage: CompletionUsage) -> str:
    choices = [
        Choice.model_construct(
            index=index,
            message=ChatCompletionMessage(role="assistant", content=text),
            logprobs=None,
            finish_reason=cast(Any, reason),
        )
        for index, (text, reason) in enumerate(texts)
    ]
    return _dump(ChatCompletion(**_head(answer, "chat.completion"), choices=choices, usage=usage))


def completion_chunk(answer: Answer, delta: TextDelta) -> str:
    choice = _completion_choice(delta.index, delta.text, delta.finish_reason)
    return _dump(Completion.model_construct(**_head(answer, "text_completion"), choices=[choice]))


def chat_chunk(answer: Answer, delta: TextDelta) -> str:
    content = ChoiceDelta(content=delta.text) if delta.text else ChoiceDelta()
    return _chat_chunk(answer, delta.index, content, delta.finish_reason)


def role_chunk(answer: Answer, index: int) -> str:
    """A chat stream opens with the role of the speaker."""
    return _chat_chunk(answer, index, ChoiceDelta(role="assistant", content=""), None)


def usage_chunk(answer: Answer, usage: CompletionUsage, is_chat: bool) -> str:
    """The last chunk of a stream that was asked for its usage: no choice, only the numbers."""
    if is_chat:
        return _dump(ChatCompletionChunk(**_head(answer, "chat.completion.chunk"), choices=[], usage=usage))
    return _dump(Completion(**_head(answer, "text_completion"), choices=[], usage=usage))


def _chat_chunk(answer: Answer, index: int, content: ChoiceDelta, finish_reason: Any) -> str:
    choice = ChunkChoice.model_construct(index=index, delta=content, logprobs=None, finish_reason=finish_reason)
    return _dump(ChatCompletionChunk.model_construct(**_head(answer, "chat.completion.chunk"), choices=[choice]))


def _completion_choice(index: int, text: str, finish_reason: Any) -> CompletionChoice:
    # Constructed unchecked: the type knows no null finish reason, which every chunk but the last has.
    return CompletionChoice.model_construct(index=index, text=text, logprobs=None, finish_reason=finish_reason)


def _head(answer: Answer, object_: str) -> dict[str, Any]:
    return {"id": answer.id, "object": object_, "created": answer.created, "model": answer.model}


def _dump(model: BaseModel) -> str:
    return model.model_dump_json(exclude_unset=True, warnings=False)
