"""The gRPC API (inference.proto) offers the functions of the REST API in typed messages.

All methods are plain coroutines, so that the gateway's own gRPC server and Ray Serve's gRPC proxy can call them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from google.protobuf import json_format

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.engine.contract.token_output import FinishReason
from services.gateway.chat import grammars
from services.gateway.chat.answer_parser import ToolCallDelta
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall, check_message
from services.gateway.chat.output_processor import TOOL_CALLS
from services.gateway.chat.text_delta import ScoredToken, TextDelta, collect
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.chat.tools import Tool, ToolMode, ToolUse, parse_arguments
from services.gateway.errors import ApiError, GrpcError, client_errors, invalid, unexpected
from services.gateway.generation import Generation
from services.gateway.generation_request import AnswerFormat, GenerationRequest, Prompt
from services.gateway.request_id import check_request_id
from services.gateway.schema.json_text import loads

ROLES = ("system", "developer", "user", "assistant", "tool")
FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
TOOL_MODES = {
    pb.ToolChoice.MODE_UNSPECIFIED: None,
    pb.ToolChoice.MODE_AUTO: ToolMode.AUTO,
    pb.ToolChoice.MODE_NONE: ToolMode.NONE,
    pb.ToolChoice.MODE_REQUIRED: ToolMode.REQUIRED,
}


class RpcContext(Protocol):
    """An `RpcContext` is the context that gRPC or Ray Serve passes to the handler of an RPC."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


@dataclass(frozen=True)
class _GrpcReplyHead:
    """A `_GrpcReplyHead` holds the fields that are the same in every message of one response."""

    request_id: str
    model: str
    created: int

    def fields(self, delta: TextDelta) -> dict[str, Any]:
        head = {"request_id": self.request_id, "model": self.model, "created": self.created}
        return {**head, "cache_reason": delta.cache_reason}


class _Trailers:
    """A `_Trailers` collects the trailing metadata of one RPC.

    A context keeps only the metadata of the last call of `set_trailing_metadata`, so each `set` passes all entries
    again.
    """

    def __init__(self, context: RpcContext | None) -> None:
        self._context = context
        self._metadata: dict[str, str] = {}

    def set(self, name: str, value: str, is_default: bool = False) -> None:
        """Set one entry; if `is_default` is True, keep an entry that was set before."""
        self._metadata[name] = self._metadata.get(name, value) if is_default else value
        if self._context is not None:
            self._context.set_trailing_metadata(list(self._metadata.items()))


class InferenceApi:
    """An `InferenceApi` implements the RPCs; each method has the name of its RPC in snake case.

    A method raises only GrpcError. If a `context` is given, the method sets the trailing metadata of the context.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def generate(self, request: pb.GenerateRequest, context: RpcContext | None = None) -> pb.GenerateResponse:
        with self._errors(context) as trailers:
            head, choice_requests = await self._prepare(request, trailers)
            choices = await collect(self._generation.stream(choice_requests, head.request_id), len(choice_requests))
            usage = TokenUsage(request.sampling.n or 1)
            for choice in choices:
                usage.add(choice)
            trailers.set("x-expertmesh-cache", choices[0].cache_report)
            return pb.GenerateResponse(
                **head.fields(choices[0]), choices=[_choice(choice) for choice in choices], usage=_usage(usage)
            )

    async def generate_stream(
        self, request: pb.GenerateRequest, context: RpcContext | None = None
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        with self._errors(context) as trailers:
            head, choice_requests = await self._prepare(request, trailers)
            usage, num_open = TokenUsage(request.sampling.n or 1), len(choice_requests)
            async with aclosing(self._generation.stream(choice_requests, head.request_id)) as deltas:
                async for delta in deltas:
                    if not usage.num_prompt:
                        trailers.set("x-expertmesh-cache", delta.cache_report)
                    usage.add(delta)
                    num_open -= delta.finish_reason is not None
                    final_usage = None if num_open else _usage(usage)
                    yield pb.GenerateChunk(**head.fields(delta), choice=_choice(delta), usage=final_usage)

    async def list_models(self, _: pb.ListModelsRequest, __: RpcContext | None = None) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self._model()])

    async def get_model(self, request: pb.GetModelRequest, context: RpcContext | None = None) -> pb.Model:
        with self._errors(context):
            self._generation.check_model(request.id)
            return self._model()

    async def tokenize(self, request: pb.TokenizeRequest, context: RpcContext | None = None) -> pb.TokenizeResponse:
        with self._errors(context):
            generation, is_chat = self._generation, request.HasField("chat")
            generation.check_model(request.model)
            add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else not is_chat
            with client_errors():
                token_ids = await generation.tokenize(_tokenize_request(request), add_special_tokens)
                texts = await generation.token_texts(token_ids)
            longest = generation.card.max_model_len
            return pb.TokenizeResponse(token_ids=token_ids, max_model_len=longest, token_texts=texts)

    async def detokenize(
        self, request: pb.DetokenizeRequest, context: RpcContext | None = None
    ) -> pb.DetokenizeResponse:
        with self._errors(context):
            self._generation.check_model(request.model)
            with client_errors():
                return pb.DetokenizeResponse(text=await self._generation.detokenize(list(request.token_ids)))

    def _model(self) -> pb.Model:
        card = self._generation.card
        return pb.Model(id=card.id, created=card.created, owned_by=card.owned_by, max_model_len=card.max_model_len)

    async def _prepare(
        self, request: pb.GenerateRequest, trailers: _Trailers
    ) -> tuple[_GrpcReplyHead, list[ChoiceRequest]]:
        generation = self._generation
        check_request_id(request.request_id, "request_id")
        head = _GrpcReplyHead(request.request_id or f"gen-{uuid.uuid4().hex}", generation.card.id, int(time.time()))
        trailers.set("x-request-id", head.request_id)
        generation.check_model(request.model)
        with client_errors():
            return head, await generation.prepare(_generation_request(request))

    @contextmanager
    def _errors(self, context: RpcContext | None = None) -> Iterator[_Trailers]:
        """Turn every exception that the `with` block raises into a GrpcError, and count the refusal.

        The `with` statement gives the `_Trailers` of `context` to the block.
        """
        trailers = _Trailers(context)
        try:
            yield trailers
        except Exception as error:
            known = error if isinstance(error, ApiError) else unexpected(error)
            trailers.set("x-request-id", uuid.uuid4().hex, is_default=True)
            if known.retry_after is not None:
                trailers.set("retry-after", str(known.retry_after))
            self._generation.metrics.count_refused(known.refusal.label)
            raise GrpcError(known.refusal.grpc_code, known.message) from error


def _generation_request(request: pb.GenerateRequest) -> GenerationRequest:
    sampling = _sampling(request.sampling)
    if request.echo and "logprobs" in sampling:
        sampling.setdefault("prompt_logprobs", sampling["logprobs"])
    n = sampling.pop("n", None)
    timeout = request.timeout if request.HasField("timeout") else None
    return GenerationRequest(
        _prompt(request),
        sampling,
        n,
        request.echo,
        _answer_format(request.response_format),
        _tool_use(request.chat),
        timeout,
        _thinking(request.chat),
    )


def _prompt(request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return _conversation(request.chat)
    raise invalid("prompt is missing; one of text, token_ids and chat must be set.", "prompt")


def _tokenize_request(request: pb.TokenizeRequest) -> GenerationRequest:
    match request.WhichOneof("prompt"):
        case "text":
            return GenerationRequest(request.text)
        case "chat":
            conversation = _conversation(request.chat)
            if request.HasField("add_generation_prompt"):
                conversation = replace(conversation, add_generation_prompt=request.add_generation_prompt)
            return GenerationRequest(conversation, tool_use=_tool_use(request.chat))
    raise invalid("prompt is missing; one of text and chat must be set.", "prompt")


def _conversation(chat: pb.Chat) -> Conversation:
    """Return the messages and template arguments of `chat` as a `Conversation`, to which the tools are added later."""
    kwargs = json_format.MessageToDict(chat.template_kwargs) if chat.HasField("template_kwargs") else None
    messages = tuple(_message(f"messages[{index}]", message) for index, message in enumerate(chat.messages))
    return Conversation(messages, template_kwargs=_thinking(chat).template_kwargs(kwargs))


def _thinking(chat: pb.Chat) -> Thinking:
    names = ("reasoning_effort", "thinking_token_budget", "enable_thinking")
    return Thinking(*(getattr(chat, name) if chat.HasField(name) else None for name in names))


def _message(param: str, message: pb.ChatMessage) -> ChatMessage:
    if message.role not in ROLES:
        allowed = f"{', '.join(map(repr, ROLES[:-1]))} or {ROLES[-1]!r}"
        raise invalid(f"{param}.role must be {allowed}, not {message.role!r}.", f"{param}.role")
    calls = tuple(
        PastCall(call.id, call.name, parse_arguments(call.arguments, f"{param}.tool_calls[{n}].function.arguments"))
        for n, call in enumerate(message.tool_calls)
    )
    fields = (message.name, message.reasoning_content, calls, message.tool_call_id)
    return check_message(ChatMessage(message.role, message.content, *fields), param)


def _tool_use(chat: pb.Chat) -> ToolUse:
    tools = tuple(_tool(index, tool) for index, tool in enumerate(chat.tools))
    is_named = chat.tool_choice.WhichOneof("choice") == "function"
    if chat.tool_choice.mode not in TOOL_MODES:
        highest = max(TOOL_MODES)
        raise ValueError(f"tool_choice must be a mode of 0 to {highest} or a function, not {chat.tool_choice.mode}.")
    is_parallel = chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else None
    return ToolUse.of(
        tools, TOOL_MODES[chat.tool_choice.mode], chat.tool_choice.function if is_named else None, is_parallel
    )


def _tool(index: int, tool: pb.Tool) -> Tool:
    try:
        schema = loads(tool.parameters or "{}")
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        param = f"tools[{index}].function.parameters"
        raise ValueError(f"{param} must be a JSON schema of type 'object'.")
    return Tool(tool.name, tool.description, schema, tool.strict)


def _answer_format(response_format: pb.ResponseFormat) -> AnswerFormat | None:
    match response_format.WhichOneof("format"):
        case "json_object" if response_format.json_object:
            return AnswerFormat(Grammar(GrammarKind.JSON_OBJECT), "response_format")
        case "json_schema":
            return AnswerFormat(
                Grammar(GrammarKind.JSON_SCHEMA, response_format.json_schema), "response_format.json_schema.schema"
            )
        case "regex":
            return AnswerFormat(Grammar(GrammarKind.REGEX, response_format.regex), "structured_outputs.regex")
        case "grammar":
            return AnswerFormat(Grammar(GrammarKind.LARK, response_format.grammar), "structured_outputs.grammar")
        case "choice":
            return AnswerFormat(grammars.any_of(response_format.choice.texts), "structured_outputs.choice")
    return None


def _sampling(sampling: pb.SamplingParams) -> dict[str, Any]:
    """Return the sampling parameters that the client set, by their names in SamplingParams."""
    given: dict[str, Any] = {field.name: value for field, value in sampling.ListFields()}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given


def _choice(delta: TextDelta) -> pb.Choice:
    return pb.Choice(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=FINISH_REASONS[delta.finish_reason],
        reasoning_content=delta.reasoning,
        tool_calls=[_call(call) for call in delta.calls],
        logprobs=_scores(delta.logprobs),
        prompt_logprobs=_scores(delta.prompt_logprobs),
    )


def _call(call: ToolCallDelta) -> pb.ToolCall:
    return pb.ToolCall(index=call.index, id=call.id, name=call.name, arguments=call.arguments)


def _scores(scores: Sequence[ScoredToken]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=score.token_id,
            data=score.data,
            logprob=score.logprob,
            rank=score.rank,
            top=_scores(score.top),
            text_offset=score.offset,
        )
        for score in scores
    ]


def _usage(usage: TokenUsage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
