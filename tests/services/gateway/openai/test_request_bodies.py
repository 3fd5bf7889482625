"""The tests send bodies of requests that are wrong, long or compressed."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from services.gateway.anthropic.messages_body import CountTokensBody, MessagesBody
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation, ModelCard
from services.gateway.generation_request import GenerationRequest
from services.gateway.health import Health
from services.gateway.limits import GatewayLimits
from services.gateway.openai.body import ChatBody, CompletionBody
from services.gateway.openai.tokenizer_bodies import TokenizeChatBody
from services.gateway.rest import build_rest
from tests.services.gateway.conftest import MAX_BODY_BYTES
from tests.services.gateway.echo import EchoSource, serving
from tests.services.gateway.openai.refusals import check_refused

NO_TYPE = "type must be one or more of array, boolean, integer, null, number, object, string, not 'x'."

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD_COMPLETIONS = [
    ({}, "prompt is missing, but required.", "prompt"),
    ({"prompt": 5}, "prompt must be a string, a list of strings, a list of token ids or a list of lists of", "prompt"),
    ({"prompt": []}, "prompt must be a string, a list of strings, a list of token ids or a list of lists of", "prompt"),
    ({"prompt": "a", "n": 0}, "n must be 1 to 128, not 0.", "n"),
    ({"prompt": ["a"] * 64, "n": 3}, "n times the number of prompts must be at most 128, not 192.", "n"),
    ({"prompt": "a", "n": 2, "best_of": 3}, "best_of must be equal to n (2), because answers are not ranked.", None),
    ({"prompt": "a", "suffix": "b"}, 'suffix must be "" or null, because nothing else is supported yet', None),
    ({"prompt": "a", "min_p": 1.5}, "min_p must be 0 to 1, not 1.5.", "min_p"),
    ({"prompt": "a", "presence_penalty": 3}, "presence_penalty must be -2 to 2, not 3.0.", "presence_penalty"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty must be a finite number above 0, not 0.0.", None),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be keyed by token ids as strings, not 'x'.", None),
    ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias holds the token id 999; allowed are 0 to 261.", None),
    ({"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids holds the token id 999; allowed are 0 to", None),
    ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs may only be given without str", None),
    ({"prompt": "a", "timeout": 0}, "timeout must be a number of seconds above 0, not 0.0.", "timeout"),
    ({"prompt": "a", "structured_outputs": {}}, "structured_outputs must hold exactly one of json, json_object", None),
    (
        {"prompt": "a", "structured_outputs": {"regex": "a("}},
        "structured_outputs.regex cannot be used: unclosed group.",
        "structured_outputs.regex",
    ),
    ({"prompt": "a", "structured_outputs": {"ebnf": ""}}, "Unknown field 'structured_outputs.ebnf'; the allowe", None),
    (
        {"prompt": "a", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs may not be given together with response_format; give one.",
        "structured_outputs",
    ),
    ({"prompt": [-100000000], "echo": True}, "prompt must hold token ids of at least 0, not -100000000.", "prompt"),
    (
        {"prompt": "a", "structured_outputs": {"json": 5}},
        "structured_outputs.json must be a JSON object or a valid string, not 5.",
        "structured_outputs.json",
    ),
    ({"prompt": "a", "metadata": {"k": 1}}, "metadata must hold a string for each key, not 1 for 'k'.", "metadata"),
    (
        {"prompt": "a", "structured_outputs": {"choice": []}},
        "structured_outputs.choice must hold at least one string.",
        "structured_outputs.choice",
    ),
    ({"prompt": "a", "tools": []}, "Unknown field 'tools'; docs/api.md lists the allowed fields.", "tools"),
    ({"prompt": ["a"] * 65}, "prompt must hold at most 64 prompts, not 65.", "prompt"),
    ({"prompt": "a", "max_tokens": -2}, "max_tokens must be at least 1, not -2.", "max_tokens"),
    ({"prompt": "a", "max_tokens": "9"}, "max_tokens must be a valid integer, not '9'.", "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens must be a valid integer, not True.", "max_tokens"),
    ({"prompt": "a", "temperature": -0.5}, "temperature must be a finite number of at least 0, not -0.5.", None),
    ({"prompt": "a", "top_p": -1}, "top_p must be 0 to 1, not -1.0.", "top_p"),
    (
        {"prompt": "a", "top_k": -2},
        "top_k must be 1 to 2147483647, or 0 or -1 for the whole vocabulary, not -2.",
        "top_k",
    ),
    ({"prompt": "a", "stop": [3]}, "stop must be a string or a list of strings, not [3].", "stop"),
    ({"prompt": "a", "stop": ""}, "stop must be strings of at least one character, not ''.", "stop"),
    ({"prompt": "a", "min_tokens": 9, "max_tokens": 4}, "min_tokens must be at most max_tokens (4), not 9.", None),
    ({"prompt": "a", "logprobs": 21}, "logprobs must be 0 to 20, not 21.", "logprobs"),
    ({"prompt": "a", "temprature": 1}, "Unknown field 'temprature'; the nearest allowed field is 'temperature'.", None),
    ({"prompt": "a", "stream_options": {}}, "stream_options may only be given together with stream=true.", None),
    (
        {"prompt": "a" * 64},
        "This model's maximum context length is 64 tokens. However, your prompt resulted in 64 tokens. At most 63 are "
        "allowed, because an answer needs one; the prompt is too long.",
        "prompt",
    ),
    ({"prompt": "a", "stop": ["x"] * 5}, "stop must hold at most 4 strings, not 5.", "stop"),
    ({"prompt": "a", "stop": "é" * 513}, "stop must hold strings of at most 1024 bytes, not 1026.", "stop"),
    (
        {"prompt": "a", "logit_bias": {str(n): 1 for n in range(1025)}},
        "logit_bias must hold at most 1024 tokens, not 1025.",
        "logit_bias",
    ),
    ({"prompt": ["a"] * 3, "n": 43}, "n times the number of prompts must be at most 128, not 129.", "n"),
]
BAD_CHATS = [
    ({"messages": []}, "messages must hold at least one message.", "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing, but required.", "messages[0].content"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role must be 'system', 'developer', 'user'", None),
    ({"messages": [USER], "colour": 1}, "Unknown field 'colour'; docs/api.md lists the allowed fields.", "colour"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content must hold only par",
        None,
    ),
    ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens", None),
    ({"messages": [USER], "tools": [{}]}, "tools[0].type is missing, but required.", "tools[0].type"),
    ({"messages": [USER], "tools": [TOOL, TOOL]}, "tools must hold each function once, but names 'f' twice.", "tools"),
    ({"messages": [USER], "tool_choice": "required"}, "tool_choice may only be given together with tools.", None),
    ({"messages": [USER], "tool_choice": "auto"}, "tool_choice may only be given together with tools.", "tool_choice"),
    ({"messages": [USER], "tools": [TOOL], "tool_choice": "any"}, "tool_choice must be 'auto', 'none', 'requir", None),
    ({"messages": [USER], "tool_choice": 5}, "tool_choice must be a valid string or a JSON object, not 5.", None),
    (
        {"messages": [USER], "tool_choice": {"type": "function"}},
        'tool_choice must name one function, as {"type": "function", "function": {"name": "..."}}.',
        "tool_choice",
    ),
    (
        {"messages": [USER], "tool_choice": {"type": "function", "function": {"name": "f", "x": 1}}},
        "Unknown field 'tool_choice.function.x'; the allowed fields are name.",
        "tool_choice.function.x",
    ),
    (
        {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice names the function 'g'; the tools are 'f'.",
        "tool_choice",
    ),
    (
        {
            "messages": [USER],
            "tools": [TOOL],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "response_format may not be given together with a tool_choice that forces a call.",
        "response_format",
    ),
    (
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name must be 1 to 64 letters, digits, '_', '-' or '.', not 'a b'.",
        "tools[0].function.name",
    ),
    ({"messages": [USER], "top_logprobs": 2}, "top_logprobs may only be given together with logprobs=true.", None),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs must be 0 to 20, not 21.", None),
    ({"messages": [USER], "echo": True}, "echo must be false or null, because nothing else is supported yet", "echo"),
    ({"messages": [USER], "response_format": {"type": "json_schema"}}, "response_format must hold a json_schema", None),
    (
        {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        f"response_format.json_schema.schema cannot be used: {NO_TYPE}",
        "response_format.json_schema.schema",
    ),
    ({"messages": [USER], "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs must not hold 'tools'", None),
    (
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False},
        "enable_thinking must not contradict enable_thinking in chat_template_kwargs; set only one.",
        "enable_thinking",
    ),
    ({"messages": [{**USER, "tool_call_id": "x"}]}, "messages[0].tool_call_id must be given where the role is", None),
    ({"messages": [{**USER, "reasoning_content": "x"}]}, "messages[0].reasoning_content may only be given whe", None),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "["}}]}]},
        "messages[0].tool_calls[0].function.arguments must be a JSON object as a string, not '['.",
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "messages do not fit the model's chat template:", None),
    ({"messages": ["hi"]}, "messages[0] must be a JSON object.", "messages[0]"),
]


@pytest.mark.parametrize(("body", "message", "param"), BAD_COMPLETIONS)
def test_bad_completions(http: httpx.Client, body: dict[str, Any], message: str, param: str | None) -> None:
    check_refused(http.post("/v1/completions", json=body), 400, message, param)


@pytest.mark.parametrize(("body", "message", "param"), BAD_CHATS)
def test_bad_chats(http: httpx.Client, body: dict[str, Any], message: str, param: str | None) -> None:
    check_refused(http.post("/v1/chat/completions", json=body), 400, message, param)


@pytest.mark.parametrize("data", [b"", b"{", b"{'prompt': 1}", b"\xff\xfe", b'{"prompt": "\xff"}'])
def test_malformed_json(http: httpx.Client, data: bytes) -> None:
    check_refused(http.post("/v1/completions", content=data), 400, "The body is not valid JSON: ")


@pytest.mark.parametrize("data", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object(http: httpx.Client, data: bytes) -> None:
    check_refused(http.post("/v1/completions", content=data), 400, "The body must be a JSON object.")


@pytest.mark.parametrize("num_bytes", [MAX_BODY_BYTES + 1, 10 * MAX_BODY_BYTES, 50 * MAX_BODY_BYTES])
def test_a_large_body(http: httpx.Client, num_bytes: int) -> None:
    body = json.dumps({"prompt": "a" * num_bytes})[:num_bytes].encode()
    try:
        answer = http.post("/v1/completions", content=body)
    except httpx.WriteError:
        assert num_bytes > 16 * MAX_BODY_BYTES  # the server closes the connection while such a large body arrives
    else:
        check_refused(answer, 413, "The body must be at most 100000 bytes long, but is longer.")


def test_entries_of_logit_bias_are_counted_before_they_are_parsed() -> None:
    with pytest.raises(ValidationError, match="must hold at most 131072 entries, not 140000"):
        CompletionBody.model_validate(
            {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(140_000)), "no number")}
        )


def test_long_bodies_of_every_kind(http: httpx.Client, source: EchoSource) -> None:
    """Check that bodies which are parsed, prepared and answered in threads get the same answers as short ones."""
    source.script = [66]
    long = "a" * 60_000
    assert http.post("/v1/completions", json={"prompt": long, "truncate_prompt_tokens": 5}).status_code == 200
    refused = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": long}]}).json()["error"]
    assert refused["message"].startswith("This model's maximum context length is 64 tokens. However, your messages res")
    tokens = http.post("/tokenize", json={"prompt": long, "return_token_strs": True}).json()
    assert (tokens["count"], len(tokens["tokens"]), tokens["token_strs"][-1]) == (60_000, 60_000, "a")
    assert http.post("/detokenize", json={"tokens": tokens["tokens"][:30_000]}).json() == {"prompt": "a" * 30_000}


def test_ids_to_detokenize_are_counted_before_they_are_parsed(
    source: EchoSource, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = GatewayLimits(tokenize_tokens=1024)
    generation = Generation(source, tokenizer, ModelCard("echo", 64, created=1), limits=limits)
    with serving(build_rest(generation, lambda: Health(is_ready=True))) as url:
        assert httpx.post(f"{url}/detokenize", json={"tokens": [65] * 1024, "model": "echo"}).status_code == 200
        sentence = "tokens must hold at most 1024 token ids, but holds more."
        assert httpx.post(f"{url}/detokenize", json={"tokens": [65] * 1025}).json()["error"]["message"] == sentence
        monkeypatch.setattr("services.gateway.openai.routes.parse_body", None)
        refused = httpx.post(f"{url}/detokenize", json={"tokens": [65] * 10_000})
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, sentence)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_stop_token_ids_are_counted_before_they_are_checked(http: httpx.Client, path: str) -> None:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"input": "a"} if path == "/v1/responses" else {}
    asked |= {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {}
    refused = http.post(path, json=asked | {"stop_token_ids": ["no number"] * 129})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "stop_token_ids must be at most 128 ids, not 129 ids."
    assert http.post(path, json=asked | {"stop_token_ids": [5.0] * 128}).status_code == 200


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", ChatBody),
        ("/v1/messages", MessagesBody),
        ("/v1/messages/count_tokens", CountTokensBody),
        ("/tokenize", TokenizeChatBody),
    ],
)
def test_long_bodies_are_read_in_a_thread(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, kind: type[ChatBody]
) -> None:
    threads: list[str] = []
    read = kind.request

    def noted(self: ChatBody) -> GenerationRequest:
        threads.append(threading.current_thread().name.partition("_")[0])
        return read(self)

    monkeypatch.setattr(kind, "request", noted)
    rest = {"model": "echo", "max_tokens": 1} if "messages" in path else {}
    if path == "/v1/messages/count_tokens":
        del rest["max_tokens"]
    for length in (10, 20_000):
        http.post(path, json={"messages": [{"role": "user", "content": "a" * length}], **rest})
    assert threads[0] != "gateway"
    assert threads[1:] == ["gateway"]


MADE_AT = 0  # time in the data of gzip; with the current time, the ids of the tests would differ between two processes
COMPRESSORS = {"gzip": gzip.compress, "X-Gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}


@pytest.mark.parametrize("encoding", COMPRESSORS)
def test_compressed_bodies(http: httpx.Client, encoding: str) -> None:
    data = COMPRESSORS[encoding](b'{"prompt": "hello"}')
    answer = http.post("/v1/completions", content=data, headers={"Content-Encoding": encoding})
    assert answer.json()["choices"][0]["text"] == "hello"


@pytest.mark.parametrize(
    ("encoding", "data", "status", "message"),
    [
        (
            "br",
            b"x",
            415,
            "The body's Content-Encoding must be one of 'identity', 'gzip', 'x-gzip', 'deflate', not 'br'.",
        ),
        ("gzip", b'{"prompt": "x"}', 400, "The body is not valid gzip data: "),
        (
            "gzip",
            gzip.compress(b'{"prompt": "hello"}', mtime=MADE_AT)[:-9],
            400,
            "The body's gzip data ends too early.",
        ),
        ("deflate", b"", 400, "The body's deflate data ends too early."),
        (
            "gzip",
            gzip.compress(b" " * 50_000_000, mtime=MADE_AT),
            413,
            "The body must be at most 100000 bytes long, but is longer.",
        ),
    ],
)
def test_compressed_bodies_that_are_refused(
    http: httpx.Client, encoding: str, data: bytes, status: int, message: str
) -> None:
    answer = http.post("/v1/completions", content=data, headers={"Content-Encoding": encoding})
    check_refused(answer, status, message)
