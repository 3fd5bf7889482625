from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.engine.contract.errors import EngineOverloaded
from services.engine.contract.sampling_params import SamplingParams
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.errors import GrpcError
from services.gateway.generation import Generation
from services.gateway.grpc_api import InferenceApi
from tests.services.gateway.echo import EOS, EchoSource

DEEP = "[" * 40_000 + "]" * 40_000


@pytest.fixture
def api(generation: Generation) -> InferenceApi:
    return InferenceApi(generation)


async def _chunks(api: InferenceApi, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    return [chunk async for chunk in api.generate_stream(request)]


def test_generate(api: InferenceApi) -> None:
    answer = asyncio.run(api.generate(pb.GenerateRequest(text="naïve 🦜", request_id="mine")))
    assert (answer.request_id, answer.model) == ("mine", "echo")
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("naïve 🦜", pb.FINISH_REASON_STOP)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 12, 23)
    assert len(choice.token_ids) == 12


@pytest.mark.parametrize("tokens_per_output", [1, 4])
def test_stream_equals_generate(api: InferenceApi, source: EchoSource, tokens_per_output: int) -> None:
    source.tokens_per_output = tokens_per_output
    sampling = pb.SamplingParams(max_tokens=9, stop=["lo w"], ignore_eos=True)
    request = pb.GenerateRequest(text="hello world", sampling=sampling)
    whole = asyncio.run(api.generate(request))
    chunks = asyncio.run(_chunks(api, request))
    assert "".join(chunk.choice.text for chunk in chunks) == whole.choices[0].text == "hel"
    assert [token for chunk in chunks for token in chunk.choice.token_ids] == list(whole.choices[0].token_ids)
    assert chunks[-1].choice.finish_reason == whole.choices[0].finish_reason == pb.FINISH_REASON_STOP
    assert chunks[-1].usage == whole.usage
    assert not any(chunk.HasField("usage") for chunk in chunks[:-1])
    assert chunks[0].request_id.startswith("gen-")


def test_every_kind_of_prompt(api: InferenceApi, source: EchoSource) -> None:
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, 1]))
    assert list(asyncio.run(api.generate(ids)).choices[0].token_ids[:2]) == [0, 1]
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hello")])
    answer = asyncio.run(api.generate(pb.GenerateRequest(chat=chat)))
    assert answer.choices[0].text == "user\nhello"
    assert [params.max_tokens for params in source.seen] == [16, None]


def test_sampling_reaches_the_engine(api: InferenceApi, source: EchoSource) -> None:
    given: dict[str, Any] = {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "top_k": 4, "seed": 7}
    given |= {"ignore_eos": True, "min_tokens": 0}
    sampling = pb.SamplingParams(**given, stop=["x"], stop_token_ids=[9])
    asyncio.run(api.generate(pb.GenerateRequest(text="a", sampling=sampling)))
    assert source.seen == [SamplingParams(**given, stop=("x",), stop_token_ids=(9,))]


def test_token_ids_and_texts(api: InferenceApi, source: EchoSource, tokenizer: Tokenizer) -> None:
    source.script = tokenizer.encode("one<|im_start|>two")
    given: dict[str, Any] = {"text": "abcdef", "sampling": pb.SamplingParams(stop=["wo"])}
    plain = asyncio.run(api.generate(pb.GenerateRequest(**given))).choices[0]
    assert (plain.text, list(plain.prompt_token_ids)) == ("onet", [])
    given |= {"truncate_prompt_tokens": 2, "skip_special_tokens": False, "include_stop_str_in_output": True}
    request = pb.GenerateRequest(**given, return_token_ids=True)
    choice = asyncio.run(api.generate(request)).choices[0]
    assert choice.text == "one<|im_start|>two"
    assert list(choice.token_ids) == source.script
    assert list(choice.prompt_token_ids) == tokenizer.encode("ef")
    first, *others = asyncio.run(_chunks(api, request))
    assert list(first.choice.prompt_token_ids) == tokenizer.encode("ef")
    assert not any(chunk.choice.prompt_token_ids for chunk in others)


def test_the_end_of_a_chat(api: InferenceApi, tokenizer: Tokenizer) -> None:
    messages = [pb.ChatMessage(role="user", content="a"), pb.ChatMessage(role="assistant", content="b")]

    def prompt(**given: Any) -> str:
        request = pb.GenerateRequest(chat=pb.Chat(messages=messages, **given), return_token_ids=True)
        return tokenizer.decode(asyncio.run(api.generate(request)).choices[0].prompt_token_ids)

    whole = f"<|im_start|>user\na{EOS}\n<|im_start|>assistant\nb"
    assert prompt(continue_final_message=True) == whole
    assert prompt(add_generation_prompt=False) == f"{whole}{EOS}\n"
    assert prompt() == f"{whole}{EOS}\n<|im_start|>assistant\n"
    with pytest.raises(GrpcError, match="continue_final_message may not be true together with add_generation_prompt"):
        prompt(continue_final_message=True, add_generation_prompt=True)


def test_tokens_of_reasoning(api: InferenceApi, source: EchoSource, tokenizer: Tokenizer) -> None:
    source.script = tokenizer.encode("so</think>yes")
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a")], reasoning_effort="low", thinking_token_budget=9)
    answer = asyncio.run(api.generate(pb.GenerateRequest(chat=chat)))
    assert (answer.choices[0].reasoning_content, answer.choices[0].text) == ("so", "yes")
    assert answer.usage.reasoning_tokens == len(tokenizer.encode("so</think>"))
    budget = source.seen[0].thinking_budget
    assert budget is not None
    assert budget.max_tokens == 9


def test_allowed_functions(api: InferenceApi, source: EchoSource) -> None:
    tools = [pb.Tool(name="f", parameters='{"type": "object"}'), pb.Tool(name="g", parameters='{"type": "object"}')]
    choice = pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, allowed=["g"])
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="a")], tools=tools, tool_choice=choice)
    asyncio.run(api.generate(pb.GenerateRequest(chat=chat)))
    grammar = source.seen[0].grammar
    assert grammar is not None
    assert "=g>" in grammar.text
    assert "=f>" not in grammar.text


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt is missing; one of text, token_ids and chat must be set."),
        (pb.GenerateRequest(text="a", model="gpt"), "NOT_FOUND", "The model 'gpt' does not exist; this server serv"),
        (pb.GenerateRequest(text="a" * 64), "INVALID_ARGUMENT", "This model's maximum context length is 64"),
        (
            pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=-2)),
            "INVALID_ARGUMENT",
            "max_tokens must be at least 1, not -2.",
        ),
        (pb.GenerateRequest(chat=pb.Chat()), "INVALID_ARGUMENT", "messages must hold at least one message."),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="robot")])),
            "INVALID_ARGUMENT",
            "messages[0].role must be 'system', 'developer', 'user', 'assistant' or 'tool', not 'robot'.",
        ),
        (
            pb.GenerateRequest(text="a", response_format=pb.ResponseFormat(choice={"texts": []})),
            "INVALID_ARGUMENT",
            "structured_outputs.choice must hold at least one string.",
        ),
        (pb.GenerateRequest(text="a", request_id="x" * 129), "INVALID_ARGUMENT", "request_id must be at most 128"),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * ((1 << 20) + 1))),
            "INVALID_ARGUMENT",
            "prompt must hold at most 1048576 token ids, not 1048577.",
        ),
        (
            pb.GenerateRequest(text="a", sampling=pb.SamplingParams(stop_token_ids=[1] * 129)),
            "INVALID_ARGUMENT",
            "stop_token_ids must be at most 128 ids, not 129 ids.",
        ),
        (
            pb.GenerateRequest(text="a", sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))),
            "INVALID_ARGUMENT",
            "logit_bias must hold at most 1024 tokens, not 1025.",
        ),
    ],
)
def test_refusals(api: InferenceApi, request_: pb.GenerateRequest, code: str, message: str) -> None:
    for call in (api.generate(request_), _chunks(api, request_)):
        with pytest.raises(GrpcError) as refusal:
            asyncio.run(call)
        assert refusal.value.code is grpc.StatusCode[code]
        assert refusal.value.message.startswith(message)


def test_an_overloaded_engine(api: InferenceApi, source: EchoSource) -> None:
    source.fails = EngineOverloaded("Too many requests wait.")
    with pytest.raises(GrpcError) as refusal:
        asyncio.run(api.generate(pb.GenerateRequest(text="a")))
    assert refusal.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


class TrailerContext:
    """A `TrailerContext` replaces a real RPC context; each call of `set_trailing_metadata` replaces all metadata."""

    metadata: dict[str, str]

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.metadata = dict(trailing_metadata)


def test_trailing_metadata(api: InferenceApi, source: EchoSource) -> None:
    source.cached = (1, "evicted")
    context = TrailerContext()
    asyncio.run(api.generate(pb.GenerateRequest(text="ab", request_id="mine"), context))
    assert context.metadata == {"x-request-id": "mine", "x-expertmesh-cache": "evicted; cached=1"}
    context = TrailerContext()
    source.fails = EngineOverloaded("Too many requests wait.", retry_after=7)
    with pytest.raises(GrpcError):
        asyncio.run(api.generate(pb.GenerateRequest(text="ab"), context))
    assert context.metadata["retry-after"] == "7"
    assert context.metadata["x-request-id"].startswith("gen-")


def test_several_choices_and_tools(api: InferenceApi) -> None:
    several = pb.GenerateRequest(text="ab", sampling=pb.SamplingParams(n=2))
    answer = asyncio.run(api.generate(several))
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ab"), (1, "ab")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)
    bad = pb.Chat(messages=[pb.ChatMessage(role="user")], tools=[pb.Tool(name="f", parameters="[")])
    with pytest.raises(GrpcError, match=r"tools\[0\]\.function\.parameters must be a JSON schema of type 'object'\."):
        asyncio.run(api.generate(pb.GenerateRequest(chat=bad)))


def test_closing_the_stream_frees_the_engine(api: InferenceApi, source: EchoSource) -> None:
    async def read_one() -> None:
        stream = api.generate_stream(pb.GenerateRequest(text="abcd"))
        await anext(stream)
        assert source.active
        await stream.aclose()
        assert not source.active

    asyncio.run(read_one())


def test_list_models(api: InferenceApi) -> None:
    (model,) = asyncio.run(api.list_models(pb.ListModelsRequest())).models
    assert (model.id, model.owned_by, model.max_model_len, model.created) == ("echo", "expertmesh", 64, 1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            pb.GenerateRequest(chat=pb.Chat(tools=[pb.Tool(name="f", parameters='{"a": ' + DEEP + "}")])),
            "tools[0].function.parameters may be nested at most 128 levels deep, not 40001.",
        ),
        (
            pb.GenerateRequest(
                chat=pb.Chat(
                    messages=[pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments=DEEP)])]
                )
            ),
            "messages[0].tool_calls[0].function.arguments may be nested at most 128 levels deep, not 40000.",
        ),
        (
            pb.GenerateRequest(text="a", response_format=pb.ResponseFormat(json_schema='{"enum": ' + DEEP + "}")),
            "response_format.json_schema.schema ",
        ),
    ],
)
def test_deep_json(
    api: InferenceApi, request_: pb.GenerateRequest, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(GrpcError) as refused:
        asyncio.run(api.generate(request_))
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(refused.value).startswith(message), str(refused.value)
    assert len(str(refused.value)) < 400
    assert not caplog.records
