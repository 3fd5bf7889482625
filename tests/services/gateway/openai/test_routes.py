from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
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

NO_TYPE = "type must be one or more of array, boolean, integer, null, number, object, string, not 'x'."


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="naïve 🦜", max_tokens=40)
    assert answer.choices[0].text == "naïve 🦜"
    assert (answer.choices[0].finish_reason, answer.choices[0].index) == ("stop", 0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "echo"
    assert answer.usage is not None
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (11, 12, 23)  # the last token of the answer is the end of sequence


def test_streamed_completion(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="echo", prompt="naïve 🦜", max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "naïve 🦜"
    assert all("\ufffd" not in text for text in texts)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None] * 7 + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 23
    assert len({chunk.id for chunk in chunks}) == 1


def test_max_tokens_and_its_defaults(client: openai.OpenAI, source: EchoSource) -> None:
    assert client.completions.create(model="echo", prompt="abcdefgh", max_tokens=3).choices[0].text == "abc"
    answer = client.completions.create(model="echo", prompt="a" * 40)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a" * 16, "length")
    assert client.completions.create(model="echo", prompt="a" * 60).choices[0].text == "a" * 4
    client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
    client.completions.create(model="echo", prompt="abc", max_tokens=-1)
    client.completions.create(model="echo", prompt="a" * 60, max_tokens=1000, extra_body={"min_tokens": 900})
    assert [params.max_tokens for params in source.seen] == [3, 16, 4, None, None, 4]
    assert source.seen[-1].min_tokens == 4


def test_every_kind_of_prompt(client: openai.OpenAI, generation: Generation) -> None:
    ids = client.completions.create(model="echo", prompt=[0, 1, 2]).choices[0].text
    assert len(ids) == 3
    for prompt in (["one", "two"], [[65, 66], [67]]):
        answer = client.completions.create(model="echo", prompt=prompt)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert len({choice.text for choice in answer.choices}) == 2
    stream = client.completions.create(model="echo", prompt=["one", "three"], stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "one", 1: "three"}


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hello"}])
    message = answer.choices[0].message
    # The echoed prompt ends with the special token that ends the message, which has no text.
    assert (message.role, message.content) == ("assistant", "user\nhello")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    # Clients may send the message of an answer back unchanged, as the next request does.
    turns: list[Any] = [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, message]
    again = client.chat.completions.create(model="echo", messages=turns, max_completion_tokens=9)
    assert again.choices[0].message.content == "system\nx"


def test_streamed_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    with client.chat.completions.stream(model="echo", messages=messages) as stream:
        content = stream.get_final_completion().choices[0].message.content
    assert content == "user\nhello"
    chunks = list(client.chat.completions.create(model="echo", messages=messages, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "user\nhello"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stream_format(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "ab", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["finish_reason"] is None


@pytest.mark.parametrize("tokens_per_output", [1, 3, 64])
def test_stop_string(client: openai.OpenAI, source: EchoSource, tokens_per_output: int) -> None:
    source.tokens_per_output = tokens_per_output
    extra = {"ignore_eos": True}
    answer = client.completions.create(model="echo", prompt="hello<stop>x", stop="<stop>", extra_body=extra)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9  # "hello" has three tokens, and "<stop>" has six
    assert not source.active
    stream = client.completions.create(
        model="echo", prompt="hello<sto<stop>", stop=["nothing", "<stop>"], stream=True, max_tokens=30, extra_body=extra
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "hello<sto"
    assert not source.active


def test_text_held_back_is_shown_at_the_end(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="abc<st", stop="<stop>")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc<st", "stop")


def test_stop_strings_wait_for_min_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="a.b.c.d", stop=".", extra_body={"min_tokens": 3})
    assert answer.choices[0].text == "a.b"


def test_sampling_reaches_the_engine(client: openai.OpenAI, source: EchoSource) -> None:
    client.completions.create(
        model="echo", prompt="a", temperature=0, top_p=0.5, seed=7, stop=["x"], max_tokens=5, user="me", n=1,
        presence_penalty=0, extra_body={"top_k": 4, "stop_token_ids": [9], "ignore_eos": True, "min_tokens": 2},
    )  # fmt: skip
    params = source.seen[0]
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0, 0.5, 4, 7)
    assert (params.stop, params.stop_token_ids, params.ignore_eos, params.min_tokens) == (("x",), (9,), True, 2)
    client.completions.create(model="echo", prompt="a")
    assert source.seen[1] == type(params)(max_tokens=16)


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
    _check_refused(http.post("/v1/completions", json=body), 400, message, param)


@pytest.mark.parametrize(("body", "message", "param"), BAD_CHATS)
def test_bad_chats(http: httpx.Client, body: dict[str, Any], message: str, param: str | None) -> None:
    _check_refused(http.post("/v1/chat/completions", json=body), 400, message, param)


def _check_refused(answer: httpx.Response, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].startswith(message), error["message"]
    assert error["message"][-1] in ".;", error["message"]
    assert param is None or error["param"] == param
    return error


@pytest.mark.parametrize("data", [b"", b"{", b"{'prompt': 1}", b"\xff\xfe", b'{"prompt": "\xff"}'])
def test_malformed_json(http: httpx.Client, data: bytes) -> None:
    _check_refused(http.post("/v1/completions", content=data), 400, "The body is not valid JSON: ")


@pytest.mark.parametrize("data", [b"[]", b"3", b"null"])
def test_a_body_that_is_no_object(http: httpx.Client, data: bytes) -> None:
    _check_refused(http.post("/v1/completions", content=data), 400, "The body must be a JSON object.")


@pytest.mark.parametrize("num_bytes", [MAX_BODY_BYTES + 1, 10 * MAX_BODY_BYTES, 50 * MAX_BODY_BYTES])
def test_a_large_body(http: httpx.Client, num_bytes: int) -> None:
    body = json.dumps({"prompt": "a" * num_bytes})[:num_bytes].encode()
    try:
        answer = http.post("/v1/completions", content=body)
    except httpx.WriteError:
        assert num_bytes > 16 * MAX_BODY_BYTES  # the server closes the connection while such a large body arrives
    else:
        _check_refused(answer, 413, "The body must be at most 100000 bytes long, but is longer.")


def test_unknown_routes_methods_and_models(http: httpx.Client) -> None:
    _check_refused(http.get("/v1/nothing"), 404, "There is no path /v1/nothing; /v1/models lists the served models.")
    _check_refused(http.get("/v1/completions"), 405, "/v1/completions must be requested with POST, not GET.")
    for answer in (http.post("/v1/completions", json={"model": "gpt", "prompt": "a"}), http.get("/v1/models/gpt")):
        error = _check_refused(answer, 404, "The model 'gpt' does not exist; this server serves 'echo'.", "model")
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            EngineOverloaded("Too many requests are waiting; try again later."),
            429,
            "Too many requests are waiting; try again later.",
        ),
        (EngineFailed("The step failed."), 500, "The step failed."),
        (DeadlinePassed("Too late."), 504, "Too late."),
        (ValueError("prompt holds the token id 9999; allowed are 0 to 99."), 400, "prompt holds the token id 9999;"),
        (KeyError("x"), 500, "The server failed; its log says more."),
    ],
)
def test_refusals_by_the_engine(
    http: httpx.Client, source: EchoSource, error: Exception, status: int, message: str, is_streamed: bool
) -> None:
    source.fails = error
    answer = http.post("/v1/completions", json={"prompt": "ab", "stream": is_streamed})
    _check_refused(answer, status, message)
    assert answer.headers.get("retry-after") == ("1" if status == 429 else None)


def test_a_failure_within_a_stream_ends_it_with_an_error(client: openai.OpenAI, source: EchoSource) -> None:
    source.fails, source.num_good = EngineFailed("The step failed."), 2
    stream = client.completions.create(model="echo", prompt="abcd", stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match=r"The step failed\."):
        texts.extend(chunk.choices[0].text for chunk in stream)
    with pytest.raises(openai.InternalServerError, match=r"The step failed\."):
        client.completions.create(model="echo", prompt=["abcd", "efgh"])
    assert not source.active


def test_an_engine_that_ends_without_a_reason(http: httpx.Client, source: EchoSource) -> None:
    source.forgets_reason = True
    answer = http.post("/v1/completions", json={"prompt": "ab"})
    _check_refused(answer, 500, "The engine ended the request without a finish reason.")


def _wait_until_idle(source: EchoSource) -> None:
    deadline = time.monotonic() + 5
    while source.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not source.active


@pytest.mark.parametrize("num_good_first", [0, 1])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("prompt", ["ab", ["ab", "cd"]])
def test_a_client_that_goes_away_frees_the_engine(
    url: str, source: EchoSource, prompt: str | list[str], is_streamed: bool, num_good_first: int
) -> None:
    source.pause = 0.02 if num_good_first else 60
    body = json.dumps({"prompt": prompt, "stream": is_streamed, "ignore_eos": True, "max_tokens": 60}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not source.active:
            time.sleep(0.005)
        if is_streamed and num_good_first:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            source.pause = 60  # the disconnect must be noticed although no further token comes
    _wait_until_idle(source)


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "expertmesh"
    assert http.get("/v1/models/echo").json()["max_model_len"] == 64


def test_health(http: httpx.Client, health: dict[str, Health]) -> None:
    assert http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").json() == {"status": "ready", "detail": ""}
    health["now"] = Health(is_ready=True, is_degraded=True, detail="2 experts have one home.")
    answer = http.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    health["now"] = Health(is_ready=False, detail="0 of 3 shards are up.")
    answer = http.get("/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "not_ready", "detail": "0 of 3 shards are up."})


def test_metrics(client: openai.OpenAI, http: httpx.Client, source: EchoSource) -> None:
    client.completions.create(model="echo", prompt="abcd", max_tokens=3)
    client.completions.create(model="echo", prompt="abcd", stop="b", stream=True).close()
    http.post("/v1/completions", json={})
    _wait_until_idle(source)
    lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    label = '{model_name="echo"}'
    assert lines[f"expertmesh:time_to_first_token_seconds_count{label}"] == "2.0"
    assert lines[f"expertmesh:prompt_tokens_total{label}"] == "8.0"
    assert float(lines[f"expertmesh:inter_token_latency_seconds_count{label}"]) >= 2
    assert float(lines[f"expertmesh:generation_tokens_total{label}"]) >= 4
    assert lines[f"expertmesh:num_requests_open{label}"] == "0.0"
    assert lines['expertmesh:request_success_total{finished_reason="length",model_name="echo"}'] == "1.0"
    assert lines['expertmesh:request_refused_total{model_name="echo",reason="invalid"}'] == "1.0"
    assert lines["expertmesh:steps_total"] == "3.0"


def test_streams_hold_no_line_ends_but_their_own(client: openai.OpenAI, http: httpx.Client) -> None:
    text = "a\u2028b\u2029c\u0085d"  # some clients take these characters for the end of a line
    answer = http.post("/v1/completions", json={"prompt": text, "stream": True})
    assert not set("\u2028\u2029\u0085") & set(answer.text)
    stream = client.completions.create(model="echo", prompt=text, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text


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
        ("gzip", gzip.compress(b'{"prompt": "hello"}')[:-9], 400, "The body's gzip data ends too early."),
        ("deflate", b"", 400, "The body's deflate data ends too early."),
        ("gzip", gzip.compress(b" " * 50_000_000), 413, "The body must be at most 100000 bytes long, but is longer."),
    ],
)
def test_compressed_bodies_that_are_refused(
    http: httpx.Client, encoding: str, data: bytes, status: int, message: str
) -> None:
    answer = http.post("/v1/completions", content=data, headers={"Content-Encoding": encoding})
    _check_refused(answer, status, message)
