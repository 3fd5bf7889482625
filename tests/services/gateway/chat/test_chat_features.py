"""The tests check choices, logprobs, echo, tools, reasoning and ids over REST, with a scripted token source."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import openai
import pytest

from services.engine.contract.sampling_params import GrammarKind
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.preparation import derived_seed
from tests.services.gateway.echo import EchoSource
from tests.services.gateway.weather import ARGUMENTS, CALL, CALL_NOW, NOW, WEATHER

USER: Any = {"role": "user", "content": "hi"}
TOOLS: Any = [WEATHER.to_template(), NOW.to_template()]


def say(source: EchoSource, tokenizer: Tokenizer, text: str) -> None:
    source.script = tokenizer.encode(text)


LONG_CONTEXT = pytest.mark.parametrize("max_model_len", [2000])


@pytest.mark.parametrize("tokens_per_output", [1, 7])
@LONG_CONTEXT
def test_tool_calls(client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer, tokens_per_output: int) -> None:
    say(source, tokenizer, f"Let me see.\n{CALL}\n{CALL_NOW}")
    source.tokens_per_output = tokens_per_output
    answer = client.chat.completions.create(model="echo", messages=[USER], tools=TOOLS)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    assert choice.message.tool_calls is not None
    functions: list[Any] = [getattr(call, "function", None) for call in choice.message.tool_calls]
    assert [function.name for function in functions] == ["get_weather", "now"]
    assert [json.loads(function.arguments) for function in functions] == [ARGUMENTS, {}]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    # The message is sent back with the tool's result. OpenAI's client must join the streamed pieces to the same answer.
    result: Any = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "sunny"}
    with client.chat.completions.stream(
        model="echo", messages=[USER, choice.message.model_dump(exclude_none=True), result], tools=TOOLS
    ) as stream:
        [streamed] = stream.get_final_completion().choices
    assert (streamed.message.content, streamed.finish_reason) == ("Let me see.", "tool_calls")
    assert [json.loads(call.function.arguments) for call in streamed.message.tool_calls or ()] == [ARGUMENTS, {}]


@LONG_CONTEXT
def test_the_model_is_told_of_tools_unless_it_may_not_use_them(
    http: httpx.Client, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "told:{% for tool in tools or [] %} {{ tool.function.name }}{% endfor %}"
    monkeypatch.setattr(tokenizer._hf, "chat_template", template)
    for choice, prompt in [("auto", "told: get_weather now"), ("required", "told: get_weather now"), ("none", "told:")]:
        body = {"messages": [USER], "tools": TOOLS, "tool_choice": choice}
        assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == prompt


@LONG_CONTEXT
def test_forced_calls_reach_the_engine_as_a_grammar(http: httpx.Client, source: EchoSource) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    for choice in ("required", named):
        http.post("/v1/chat/completions", json={"messages": [USER], "tools": TOOLS, "tool_choice": choice})
    http.post("/v1/chat/completions", json={"messages": [USER], "tools": [NOW.to_template()]})
    first, second, third = source.seen
    assert first.grammar is not None
    assert second.grammar is not None
    assert first.grammar.kind is second.grammar.kind is GrammarKind.LARK
    assert "get_weather" in first.grammar.text
    assert "get_weather" not in second.grammar.text
    assert third.grammar is None


@LONG_CONTEXT
def test_one_call_ends_the_answer_if_calls_may_not_be_parallel(
    http: httpx.Client, source: EchoSource, tokenizer: Tokenizer
) -> None:
    say(source, tokenizer, f"{CALL_NOW}\n{CALL_NOW} and so on")
    body = {"messages": [USER], "tools": TOOLS, "parallel_tool_calls": False}
    [choice] = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert not source.active


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("asked", [{"enable_thinking": True}, {"chat_template_kwargs": {"enable_thinking": True}}])
def test_reasoning(
    http: httpx.Client, source: EchoSource, tokenizer: Tokenizer, is_streamed: bool, asked: dict[str, Any]
) -> None:
    say(source, tokenizer, "So.\n</think>\n\nYes.")
    body = {"messages": [USER], "stream": is_streamed, **asked}
    answer = http.post("/v1/chat/completions", json=body)
    if is_streamed:
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        deltas = [event["choices"][0]["delta"] for event in events]
        message = {key: "".join(delta.get(key, "") for delta in deltas) for key in ("reasoning_content", "content")}
    else:
        message = answer.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("So.", "Yes.")
    plain = http.post("/v1/chat/completions", json={"messages": [USER]}).json()["choices"][0]["message"]
    assert plain == {"role": "assistant", "content": "So.\n</think>\n\nYes.", "refusal": None}


def test_several_choices(client: openai.OpenAI, source: EchoSource) -> None:
    answer = client.completions.create(model="echo", prompt=["ab", "cde"], n=2, best_of=2, seed=5)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ab"), (1, "ab"), (2, "cde"), (3, "cde")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 14)  # each prompt counts once
    assert sorted(str(params.seed) for params in source.seen) == sorted([str(derived_seed(5, n)) for n in (0, 1)] * 2)
    assert source.seen[0].seed in (5, derived_seed(5, 1))
    stream = client.chat.completions.create(model="echo", messages=[USER], n=3, stream=True)
    roles, texts = [], {0: "", 1: "", 2: ""}
    for chunk in stream:
        roles += [chunk.choices[0].index] if chunk.choices[0].delta.role else []
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert sorted(roles) == [0, 1, 2]
    assert set(texts.values()) == {"user\nhi"}


def test_seeds_of_choices() -> None:
    assert [derived_seed(None, 0), derived_seed(None, 3), derived_seed(7, 0)] == [None, None, 7]
    seeds = {derived_seed(seed, choice) for seed in range(50) for choice in range(1, 20)}
    assert len(seeds) == 50 * 19
    assert all(seed is not None and -(2**63) <= seed < 2**63 for seed in seeds)


def test_logprobs_of_completions(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = client.completions.create(model="echo", prompt="hé", logprobs=2)
    logprobs: Any = answer.choices[0].logprobs
    # The bytes of incomplete characters are shown in hexadecimal. The end-of-sequence token has no text but a logprob.
    assert logprobs.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert len(answer.choices[0].text) == 2
    assert answer.usage
    assert len(logprobs.token_logprobs) == answer.usage.completion_tokens == 4
    assert [len(top) for top in logprobs.top_logprobs] == [3, 3, 3, 3]
    assert logprobs.top_logprobs[0]["h"] == logprobs.token_logprobs[0]
    chunks = list(client.completions.create(model="echo", prompt="hé", logprobs=2, stream=True))
    streamed = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens or ()
    ]
    assert streamed == logprobs.tokens


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=[USER], logprobs=True, top_logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    spelled = bytes(byte for token in logprobs.content for byte in token.bytes or ()).decode()
    assert spelled == "<|im_start|>user\nhi<|im_end|>"
    assert [len(token.top_logprobs) for token in logprobs.content] == [1] * 9
    assert answer.usage
    assert answer.usage.completion_tokens == 9
    bare = client.chat.completions.create(model="echo", messages=[USER], logprobs=True)
    assert bare.choices[0].logprobs is not None
    assert [token.top_logprobs for token in bare.choices[0].logprobs.content or ()] == [[]] * 9


def test_echo(client: openai.OpenAI, source: EchoSource) -> None:
    answer = client.completions.create(model="echo", prompt="abc", echo=True, max_tokens=2, logprobs=0)
    logprobs: Any = answer.choices[0].logprobs
    assert answer.choices[0].text == "abcab"
    assert logprobs.tokens == ["a", "b", "c", "a", "b"]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == {"b": logprobs.token_logprobs[1]}
    scored = client.completions.create(model="echo", prompt="abc", echo=True, max_tokens=0, logprobs=0)
    assert (scored.choices[0].text, scored.choices[0].finish_reason) == ("abc", "length")
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    streamed = list(client.completions.create(model="echo", prompt=[66, 67], echo=True, max_tokens=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == "cdc"
    assert not source.active


def test_offsets_after_special_tokens_of_an_echo(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    for prompt in ("a<|im_end|>bc", tokenizer.encode("a<|im_end|>bc")):
        answer = client.completions.create(model="echo", prompt=prompt, echo=True, max_tokens=1, logprobs=0)
        logprobs: Any = answer.choices[0].logprobs
        assert answer.choices[0].text == "a<|im_end|>bca"
        assert logprobs.text_offset == [0, 1, 11, 12, 13]


def test_prompt_logprobs(http: httpx.Client) -> None:
    completion = http.post("/v1/completions", json={"prompt": "ab", "prompt_logprobs": 1}).json()["choices"][0]
    first, second = completion["prompt_logprobs"]
    assert first is None
    assert second["65"]["decoded_token"] == "b"
    assert second["65"]["rank"] == 2
    assert second["66"] == {"logprob": -0.125, "rank": 1, "decoded_token": "c"}
    chat = http.post("/v1/chat/completions", json={"messages": [USER], "prompt_logprobs": 0}).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_the_prefix_cache_did(http: httpx.Client, source: EchoSource, is_streamed: bool) -> None:
    source.cached = (2, "no_checkpoint_at_boundary")
    body = {"prompt": ["abc", "abcd"], "n": 2, "stream": is_streamed}
    if is_streamed:
        body["stream_options"] = {"include_usage": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["x-expertmesh-cache"] == "no_checkpoint_at_boundary; cached=2"
    usage = json.loads(answer.text.split("data: ")[-2])["usage"] if is_streamed else answer.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4
    metrics = http.get("/metrics").text
    label = 'model_name="echo",reason="no_checkpoint_at_boundary"'
    assert f"expertmesh:prefix_cache_requests_total{{{label}}} 4.0" in metrics
    assert 'expertmesh:prompt_tokens_cached_total{model_name="echo"} 8.0' in metrics
    assert 'expertmesh:request_queue_time_seconds_count{model_name="echo"} 4.0' in metrics


def test_request_ids(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expertmesh.requests")
    answer = http.post("/v1/completions", json={"prompt": "ab"}, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    line = json.loads(caplog.messages[-1])
    assert (line["request_id"], line["finish_reason"], line["completion_tokens"]) == ("cmpl-mine-1", "stop", 3)
    made = [http.get("/v1/models").headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2
    long = http.post("/v1/completions", json={"prompt": "ab"}, headers={"X-Request-Id": "x" * 129})
    assert long.status_code == 400
    assert long.json()["error"]["param"] == "X-Request-Id"


def test_timeout_and_priority_reach_the_engine(http: httpx.Client, source: EchoSource) -> None:
    body = {"prompt": "ab", "timeout": 2.5, "priority": -3, "metadata": {"a": "b"}, "store": False, "user": "me"}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert source.seen[0].priority == -3
    [left] = source.timeouts
    assert left is not None
    # The engine gets the time that is left after the preparation of the prompt, which may take no measurable time.
    assert 1.5 < left <= 2.5


def test_tokenize_and_detokenize(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
    assert answer == {"count": 3, "max_model_len": 64, "tokens": [257, 75, 78], "token_strs": ["hel", "l", "o"]}
    assert http.post("/detokenize", json={"tokens": [257, 75, 78]}).json() == {"prompt": "hello"}
    chat = http.post("/tokenize", json={"messages": [USER], "tools": TOOLS, "enable_thinking": True}).json()
    assert chat["token_strs"] is None
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    bare = http.post("/tokenize", json={"messages": [USER], "add_generation_prompt": False}).json()
    assert bare["count"] == chat["count"] - len("assistant\n<think>\n") - 1
    for path, body, message in [
        ("/tokenize", {}, "prompt is missing, but required."),
        ("/tokenize", {"messages": []}, "messages must hold at least one message."),
        ("/detokenize", {"tokens": [262]}, "tokens holds the token id 262; allowed are 0 to 261."),
        ("/detokenize", {"tokens": [1], "model": "x"}, "The model 'x' does not exist; this server serves 'echo'."),
    ]:
        assert http.post(path, json=body).json()["error"]["message"] == message


@LONG_CONTEXT
@pytest.mark.parametrize("is_streamed", [False, True])
def test_half_of_a_surrogate_pair_is_a_replacement_character_everywhere(
    http: httpx.Client, generation: Any, is_streamed: bool
) -> None:
    # The model's template shows only roles and contents, so the prompt is the arguments of the past call.
    half = r"\ud83d"
    generation.tokenizer._hf.chat_template, template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}"
        "{% endfor %}{% endfor %}{% for tool in tools or [] %}{{ tool.function.description }}{% endfor %}",
        generation.tokenizer._hf.chat_template,
    )
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": "b' + half + '"}'}}
    body = json.dumps(
        {
            "messages": [USER | {"content": "HALF1"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": [{"type": "function", "function": {"name": "now", "description": "HALF2"}}],
            "stop": "HALF4",
            "stream": is_streamed,
        }
    ).replace("HALF", half)
    try:
        answer = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    finally:
        generation.tokenizer._hf.chat_template = template
    assert answer.status_code == 200, answer.text
    text = answer.text
    if is_streamed:
        events = [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]
        shown = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    else:
        shown = answer.json()["choices"][0]["message"]["content"]
    assert shown == "\ufffd1b\ufffd\ufffd2"
    plain = http.post("/v1/completions", content='{"prompt": "x' + half + '", "echo": true, "max_tokens": 1}')
    assert plain.json()["choices"][0]["text"].startswith("x\ufffd")
    grammar = {"prompt": "x", "structured_outputs": {"choice": ["HALF"]}}
    assert http.post("/v1/completions", content=json.dumps(grammar).replace("HALF", half)).status_code == 200
