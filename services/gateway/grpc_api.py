"""The gRPC API (inference.proto) offers the functions of the REST API in typed messages.

All methods are plain coroutines, so that the gateway's own gRPC server and Ray Serve's gRPC proxy can call them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.gateway.answer import INLINE_BYTES
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.text_delta import TextDelta, collect
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.errors import ApiError, GrpcError, client_errors, unexpected
from services.gateway.generation import Generation
from services.gateway.request_id import check_request_id
from services.gateway.rpc.replies import choice_messages, usage_message
from services.gateway.rpc.requests import generation_request, tokenize_request

INLINE_SCORES = 1024  # responses with more logprobs are written in a thread; writing this many takes about 5 ms


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
            is_long = sum(choice.num_scores for choice in choices) > INLINE_SCORES
            messages = await self._generation.threads.run_if(
                is_long, choice_messages, choices, request.return_token_ids
            )
            return pb.GenerateResponse(**head.fields(choices[0]), choices=messages, usage=usage_message(usage))

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
                    final_usage = None if num_open else usage_message(usage)
                    is_long = delta.num_scores > INLINE_SCORES
                    [message] = await self._generation.threads.run_if(
                        is_long, choice_messages, [delta], request.return_token_ids
                    )
                    yield pb.GenerateChunk(**head.fields(delta), choice=message, usage=final_usage)

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
                is_long = request.ByteSize() > INLINE_BYTES
                asked = await generation.threads.run_if(is_long, tokenize_request, request)
                token_ids = await generation.tokenize(asked, add_special_tokens)
                texts = await generation.token_texts(token_ids) if request.return_token_strs else ()
            longest = generation.card.max_model_len
            return pb.TokenizeResponse(token_ids=token_ids, max_model_len=longest, token_texts=texts)

    async def detokenize(
        self, request: pb.DetokenizeRequest, context: RpcContext | None = None
    ) -> pb.DetokenizeResponse:
        with self._errors(context):
            self._generation.check_model(request.model)
            with client_errors():
                return pb.DetokenizeResponse(text=await self._generation.detokenize(request.token_ids))

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
            is_long = request.ByteSize() > INLINE_BYTES
            asked = await generation.threads.run_if(is_long, generation_request, request, generation.limits)
            return head, await generation.prepare(asked)

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
