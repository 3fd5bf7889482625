"""A `Surfaces` sends a request over REST and gRPC, each streamed and not streamed, to an engine with the demo model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import httpx
import torch
from google.protobuf import json_format

from model.demo import DEMO
from model.families.registry import load_family
from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.expertmesh.inference.v1 import inference_pb2_grpc
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.engine.scheduling.memory import plan_memory
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation, ModelCard, TokenSource
from services.gateway.health import Health
from services.gateway.listener import Listener, ListenerConfig
from services.gateway.ports.health_api import HealthApi
from services.gateway.rest import build_rest
from tests.services.application import free_port

MAX_LEN = 512
FINISH_REASONS = ["", "stop", "length", "tool_calls"]
# fields of the messages GenerateRequest and Chat that have the same name in REST
REQUEST_FIELDS = frozenset(
    ["timeout", "truncate_prompt_tokens", "skip_special_tokens", "include_stop_str_in_output", "return_token_ids"]
)
CHAT_FIELDS = frozenset(
    [
        *("parallel_tool_calls", "enable_thinking", "reasoning_effort", "thinking_token_budget"),
        *("add_generation_prompt", "continue_final_message"),
    ]
)
CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 504: "DEADLINE_EXCEEDED"}


@dataclass
class SurfaceResponse:
    """A `SurfaceResponse` holds a response in one form for REST and gRPC, whether or not the response was streamed."""

    choices: list[dict[str, Any]] = field(default_factory=list)
    usage: tuple[int, int, int] = (0, 0, 0)  # numbers of prompt tokens, completion tokens and cached prompt tokens
    cache: str = ""
    request_id: str = ""
    error: tuple[str, str] | None = None  # name of the gRPC code, and the error message


@contextmanager
def serving(model: Path = DEMO, max_len: int = MAX_LEN) -> Iterator[Surfaces]:
    """Run an engine with the demo model and a gateway, and yield the `Surfaces` of the gateway.

    Engine and gateway run in a thread with its own event loop, and the gateway listens on real ports. `model` is a
    directory with the demo model's weights, and `max_len` the context in tokens.
    """
    family = load_family(model)
    memory = plan_memory(family.config.state_spec, torch.float32, 64 << 20, max_len, 8)
    config = BackboneConfig(torch.float32, "cpu", max_len, max_batch_tokens=256, memory=memory, num_threads=1)
    backbone = Backbone(config, family, None, None)
    with listening(backbone.engine, backbone, model, max_len) as (http, stub):
        yield Surfaces(http, stub, backbone)


class Startable(Protocol):
    """A `Startable` is an object with `start` and `stop`, which are called on the gateway's event loop."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


@contextmanager
def listening(
    source: TokenSource, life: Startable, model: Path = DEMO, max_len: int = MAX_LEN
) -> Iterator[tuple[httpx.Client, Any]]:
    """Run a gateway in front of `source`, and yield clients of the gateway's REST port and gRPC port.

    `life` is started before the gateway starts, and stopped after the gateway has stopped.
    """
    card, tokenizer = ModelCard("demo", max_len, 1), Tokenizer(model)
    generation = Generation(source, tokenizer, card, GrammarCompiler(model).check)

    async def health() -> Health:
        return Health(is_ready=True)

    config = ListenerConfig("127.0.0.1", free_port(), free_port())
    listener = Listener(config, build_rest(generation, health), generation, HealthApi(health))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(120)

    run(life.start())
    run(listener.start())
    with (
        grpc.insecure_channel(f"127.0.0.1:{config.grpc_port}") as channel,
        httpx.Client(base_url=f"http://127.0.0.1:{config.http_port}", timeout=120) as http,
    ):
        yield http, inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
    run(listener.stop())
    run(life.stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@dataclass(frozen=True)
class Surfaces:
    """A `Surfaces` holds a REST client and a gRPC client of one gateway, and converts REST bodies to gRPC messages."""

    http: httpx.Client
    stub: Any
    backbone: Backbone | None = None  # the backbone behind the gateway; None: the backbone is in another process

    def ask_all(self, body: dict[str, Any]) -> dict[str, SurfaceResponse]:
        """Send a request over REST and gRPC, each streamed and not streamed, and return the four responses.

        First the request is sent twice over REST, so that all four requests find the same tokens in the prefix cache.
        """
        for _ in range(2):
            self.rest(body, is_streamed=False)
        return {
            "rest": self.rest(body, is_streamed=False),
            "rest stream": self.rest(body, is_streamed=True),
            "grpc": self.grpc(body, is_streamed=False),
            "grpc stream": self.grpc(body, is_streamed=True),
        }

    def rest(self, body: dict[str, Any], is_streamed: bool) -> SurfaceResponse:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        if is_streamed:
            body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        answer = self.http.post(path, json=body, headers={"X-Request-Id": "same"})
        if answer.status_code != 200:
            return SurfaceResponse(error=(CODES[answer.status_code], answer.json()["error"]["message"]))
        assert answer.headers["x-request-id"] == "same"
        result = _from_events(answer.text) if is_streamed else _from_whole(answer.json())
        result.cache, result.request_id = answer.headers["x-expertmesh-cache"], answer.headers["x-request-id"]
        return result

    def grpc(self, body: dict[str, Any], is_streamed: bool) -> SurfaceResponse:
        request = to_grpc(body)
        try:
            if is_streamed:
                call = self.stub.GenerateStream(request, timeout=120)
                result = _from_chunks(list(call))
            else:
                response, call = self.stub.Generate.with_call(request, timeout=120)
                result = _from_response(response)
        except grpc.RpcError as error:
            return SurfaceResponse(error=(error.code().name, error.details()))  # type: ignore[attr-defined]
        trailers = dict(call.trailing_metadata())
        result.cache, result.request_id = trailers["x-expertmesh-cache"], trailers["x-request-id"]
        return result


def to_grpc(body: dict[str, Any]) -> pb.GenerateRequest:
    """Return the gRPC message for the same request as the REST body `body`."""
    body = dict(body)
    request = pb.GenerateRequest(model=body.pop("model", ""), request_id="same", echo=body.pop("echo", False))
    for name in REQUEST_FIELDS & body.keys():
        setattr(request, name, body.pop(name))
    if "messages" in body:
        request.chat.CopyFrom(_chat(body))
        logprobs = body.pop("top_logprobs", 0) if body.pop("logprobs", False) else None
    else:
        prompt = body.pop("prompt")
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        logprobs = body.pop("logprobs", None)
    if logprobs is not None:
        request.sampling.logprobs = logprobs
    _set_format(request.response_format, body.pop("response_format", {}), body.pop("structured_outputs", {}))
    sampling = {
        key: {int(k): v for k, v in value.items()} if key == "logit_bias" else value for key, value in body.items()
    }
    request.sampling.MergeFrom(pb.SamplingParams(**sampling))
    return request


def _chat(body: dict[str, Any]) -> pb.Chat:
    chat = pb.Chat()
    for message in body.pop("messages"):
        fields = {**message, "tool_calls": [_past_call(call) for call in message.get("tool_calls", [])]}
        chat.messages.append(pb.ChatMessage(**fields))
    for tool in body.pop("tools", []):
        function = tool["function"]
        parameters = json.dumps(function["parameters"]) if "parameters" in function else ""
        chat.tools.append(pb.Tool(**{**function, "parameters": parameters}))
    choice = body.pop("tool_choice", None)
    if isinstance(choice, dict):
        chat.tool_choice.function = choice["function"]["name"]
    elif choice:
        chat.tool_choice.mode = pb.ToolChoice.Mode.Value(f"MODE_{choice.upper()}")
    for name in CHAT_FIELDS & body.keys():
        setattr(chat, name, body.pop(name))
    if "chat_template_kwargs" in body:
        json_format.ParseDict(body.pop("chat_template_kwargs"), chat.template_kwargs)
    return chat


def _past_call(call: dict[str, Any]) -> pb.ToolCall:
    return pb.ToolCall(id=call["id"], **call["function"])


def _set_format(to: pb.ResponseFormat, response_format: dict[str, Any], structured: dict[str, Any]) -> None:
    if response_format.get("type") == "json_object":
        to.json_object = True
    elif response_format.get("type") == "json_schema":
        to.json_schema = json.dumps(response_format["json_schema"]["schema"])
    for key, value in structured.items():
        if key == "choice":
            to.choice.texts.extend(value)
        else:
            setattr(to, key, value)


def _empty() -> dict[str, Any]:
    return {"text": "", "reasoning": "", "calls": {}, "logprobs": [], "prompt_logprobs": [], "finish": ""}


def _from_whole(answer: dict[str, Any]) -> SurfaceResponse:
    result = SurfaceResponse(usage=_usage(answer["usage"]))
    for choice in answer["choices"]:
        one = _empty()
        _add_rest(one, choice, choice.get("message", {}))
        result.choices.append(one)
    return result


def _from_events(text: str) -> SurfaceResponse:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    result, choices = SurfaceResponse(), dict[int, dict[str, Any]]()
    for event in map(json.loads, events):
        if "error" in event:
            return SurfaceResponse(error=("", event["error"]["message"]))
        if event.get("usage"):
            result.usage = _usage(event["usage"])
        for choice in event["choices"]:
            _add_rest(choices.setdefault(choice["index"], _empty()), choice, choice.get("delta", {}))
    result.choices = [choices[index] for index in sorted(choices)]
    return result


def _add_rest(one: dict[str, Any], choice: dict[str, Any], message: dict[str, Any]) -> None:
    one["text"] += choice.get("text", "") + (message.get("content") or "")
    one["reasoning"] += message.get("reasoning_content", "")
    for position, call in enumerate(message.get("tool_calls", [])):
        _add_call(one, call.get("index", position), call["function"].get("name", ""), call["function"]["arguments"])
    one["finish"] = choice["finish_reason"] or one["finish"]
    logprobs = choice["logprobs"] or {}
    for token in logprobs.get("content", []):
        tops = [(bytes(top["bytes"]), top["logprob"]) for top in token["top_logprobs"]]
        one["logprobs"].append((bytes(token["bytes"]), token["logprob"], tops))
    columns = [logprobs.get(key, []) for key in ("tokens", "token_logprobs", "text_offset")]
    for token, logprob, offset in zip(*columns, strict=True):
        one["logprobs"].append((_data(token), logprob, offset))


def _data(name: str) -> bytes:
    if name.startswith("bytes:"):
        return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
    return name.encode()


def _from_response(response: pb.GenerateResponse) -> SurfaceResponse:
    result = SurfaceResponse(usage=_grpc_usage(response.usage))
    for choice in response.choices:
        one = _empty()
        _add_grpc(one, choice)
        result.choices.append(one)
    return result


def _from_chunks(chunks: list[pb.GenerateChunk]) -> SurfaceResponse:
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        _add_grpc(choices.setdefault(chunk.choice.index, _empty()), chunk.choice)
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return SurfaceResponse([choices[index] for index in sorted(choices)], _grpc_usage(chunks[-1].usage))


def _add_grpc(one: dict[str, Any], choice: pb.Choice) -> None:
    one["text"] += choice.text
    one["reasoning"] += choice.reasoning_content
    for call in choice.tool_calls:
        _add_call(one, call.index, call.name, call.arguments)
    one["finish"] = FINISH_REASONS[choice.finish_reason] or one["finish"]
    for name in ("prompt_logprobs", "logprobs"):
        one[name] += [
            (token.data, token.logprob if token.HasField("logprob") else None, token.text_offset, token.top)
            for token in getattr(choice, name)
        ]


def _add_call(one: dict[str, Any], index: int, name: str, arguments: str) -> None:
    before = one["calls"].get(index, ("", ""))
    one["calls"][index] = (before[0] + name, before[1] + arguments)


def _usage(usage: dict[str, Any]) -> tuple[int, int, int]:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def _grpc_usage(usage: pb.Usage) -> tuple[int, int, int]:
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens


def comparable(result: SurfaceResponse, is_chat: bool, echoes: bool) -> SurfaceResponse:
    """Return `result` with logprobs in the form of REST, even if the response came over gRPC.

    In REST, the logprobs of chats have alternatives, and the logprobs of completions have offsets.
    """
    for one in result.choices:
        scores = [*(one.pop("prompt_logprobs") if echoes else one.pop("prompt_logprobs") and []), *one["logprobs"]]
        one["logprobs"] = [_comparable(score, is_chat) if len(score) == 4 else score for score in scores]
    return result


def _comparable(score: tuple[Any, ...], is_chat: bool) -> tuple[Any, ...]:
    data, logprob, offset, tops = score
    return (data, logprob, [(top.data, top.logprob) for top in tops]) if is_chat else (data, logprob, offset)
