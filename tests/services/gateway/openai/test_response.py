from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.gateway.chat.tokenizer import Tokenizer
from tests.services.gateway.echo import EchoSource, plain_http
from tests.services.gateway.weather import ARGUMENTS, CALL, WEATHER

USER = {"role": "user", "content": "hi"}
THOUGHT = "because\n</think>\n\nyes"
FUNCTION = WEATHER.to_template()["function"]


pytestmark = pytest.mark.parametrize("max_model_len", [2000])


def chat(http: httpx.Client, **more: Any) -> Any:
    answer = http.post("/v1/chat/completions", json={"messages": [USER], **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, path: str = "/v1/chat/completions", **more: Any) -> list[dict[str, Any]]:
    """Return the chunks of a streamed answer."""
    start = {"messages": [USER]} if "chat" in path else {"prompt": "hello"}
    text = http.post(path, json={**start, "stream": True, **more}).text
    *lines, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_reasoning_has_both_names(http: httpx.Client, source: EchoSource, tokenizer: Tokenizer) -> None:
    source.script = tokenizer.encode(THOUGHT)
    message = chat(http, enable_thinking=True)["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "because"
    assert message["content"] == "yes"
    deltas = [chunk["choices"][0]["delta"] for chunk in events(http, enable_thinking=True)]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == "because"


def test_reasoning_can_be_left_out(http: httpx.Client, source: EchoSource, tokenizer: Tokenizer) -> None:
    source.script = tokenizer.encode(THOUGHT)
    hidden: dict[str, Any] = {"enable_thinking": True, "include_reasoning": False}
    answer = chat(http, **hidden)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "yes", "refusal": None}
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    deltas = [chunk["choices"][0]["delta"] for chunk in events(http, **hidden)]
    assert deltas[1:] == [{"content": char} for char in "yes"] + [{}]


def test_the_finish_reason_has_a_chunk_of_its_own(http: httpx.Client, source: EchoSource) -> None:
    source.tokens_per_output = 64
    for more in ({}, {"max_tokens": 3}, {"logprobs": True}, {"stop": "hi"}):
        first, *between, last = (chunk["choices"][0] for chunk in events(http, **more))
        assert first["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert (last["delta"], last["logprobs"]) == ({}, None)
        assert last["finish_reason"] in ("stop", "length")
        assert between
        assert all(choice["finish_reason"] is None for choice in (first, *between))


def test_functions_of_the_older_api(
    http: httpx.Client, client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer
) -> None:
    source.script = tokenizer.encode(CALL)
    choice = chat(http, functions=[FUNCTION])["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["content"] is None
    assert "tool_calls" not in choice["message"]
    called = choice["message"]["function_call"]
    assert (called["name"], json.loads(called["arguments"])) == ("get_weather", ARGUMENTS)
    chunks = [chunk["choices"][0] for chunk in events(http, functions=[FUNCTION])]
    assert chunks[-1]["finish_reason"] == "function_call"
    pieces = [delta["function_call"] for chunk in chunks if "function_call" in (delta := chunk["delta"])]
    assert [piece["name"] for piece in pieces if "name" in piece] == ["get_weather"]
    assert json.loads("".join(piece["arguments"] for piece in pieces)) == ARGUMENTS
    turns: Any = [USER, choice["message"], {"role": "function", "name": "get_weather", "content": "warm"}]
    again = client.chat.completions.create(model="echo", messages=turns, functions=[FUNCTION])  # type: ignore[list-item]
    assert again.choices[0].message.function_call is not None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_in_a_stream(http: httpx.Client, path: str) -> None:
    assert not any("usage" in chunk for chunk in events(http, path))
    *chunks, last = events(http, path, stream_options={"include_usage": True, "include_obfuscation": False})
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    chunks = events(http, path, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}


def test_the_id_of_a_request(http: httpx.Client) -> None:
    assert chat(http, request_id="abc")["id"] == "chatcmpl-abc"
    answer = http.post("/v1/completions", json={"prompt": "a", "request_id": "é"})
    assert answer.json()["error"]["message"].startswith("request_id must be at most 128 printable ASCII characters")


def test_unusual_line_ends_are_escaped(http: httpx.Client, source: EchoSource, tokenizer: Tokenizer) -> None:
    text = "a\u2028b\u2029c\u0085d"
    source.script = tokenizer.encode(text)
    streamed = http.post("/v1/chat/completions", json={"messages": [USER], "stream": True}).text
    assert not any(char in streamed for char in "\u2028\u2029\u0085")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(http)) == text


def test_responses_have_the_types_of_the_official_client(url: str, source: EchoSource, tokenizer: Tokenizer) -> None:
    source.script = tokenizer.encode("because\n</think>\n\n" + CALL)
    http = plain_http()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", _strict_response_validation=True, http_client=http) as client:
        more: Any = {"model": "echo", "messages": [USER], "tools": [WEATHER.to_template()], "logprobs": True}
        thinking = {"enable_thinking": True, "return_token_ids": True}
        whole = client.chat.completions.create(**more, top_logprobs=2, n=2, extra_body=thinking)
        ChatCompletion.model_validate(whole.model_dump(), strict=True)
        chunks = list(client.chat.completions.create(**more, stream=True, extra_body=thinking))
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        completed = client.completions.create(model="echo", prompt="a", logprobs=1, max_tokens=400)
        Completion.model_validate(completed.model_dump(), strict=True)
