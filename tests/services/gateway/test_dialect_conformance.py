"""The tests ask the conformance questions about chats in every chat format, over REST and gRPC, streamed and not.

A real engine generates the answers with the demo model's weights, whose vocabulary holds the tokens of the format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.services.gateway.chat_formats import FORMATS, TEMPLATES, ChatFormat, write_model
from tests.services.gateway.surfaces import Surfaces, serving
from tests.services.gateway.test_conformance import ANSWERS, CALLED, PICK, REFUSALS, SHORT, USER, ask, chat

MAX_LEN = 1024  # tokens; more than in the other conformance tests, because a prompt may tell how to call tools
QUESTIONS = {name: body for name, body in ANSWERS.items() if "messages" in body}
REFUSED = {name: refusal for name, refusal in REFUSALS.items() if "messages" in refusal[0]}
OTHERS = [name for name in FORMATS if name != "nemotron"]  # `test_conformance` asks about Nemotron's format
Asked = tuple[ChatFormat, Surfaces]
CALLLESS = replace(FORMATS["nemotron"], template=TEMPLATES / "without-calls.jinja")


@pytest.fixture(scope="module", params=OTHERS)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """Yield each chat format in turn, with the surfaces of a gateway for a model of the format."""
    chat_format = FORMATS[request.param]
    with serving(write_model(tmp_path_factory.mktemp("model"), chat_format), MAX_LEN) as surfaces:
        yield chat_format, surfaces


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers(asked: Asked, name: str) -> None:
    result = ask(asked[1], QUESTIONS[name])
    assert result.error is None, result.error
    assert len(result.choices) == QUESTIONS[name].get("n", 1)
    for choice in result.choices:
        assert choice["finish"] in ("stop", "length", "tool_calls")


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(asked: Asked, name: str) -> None:
    body, code, message = REFUSED[name]
    result = ask(asked[1], body)
    assert result.error is not None
    assert result.error[0] == code
    assert result.error[1].startswith(message), result.error[1]


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("enable_thinking", [False, True])
def test_forced_calls_match_their_schema(asked: Asked, enable_thinking: bool, is_strict: bool) -> None:
    chat_format, surfaces = asked
    tools = [{**tool, "function": tool["function"] | {"strict": is_strict}} for tool in (PICK, SHORT)]
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    bias = {"6": 60} if enable_thinking and chat_format.switch else {}
    options = {"tools": tools, "enable_thinking": enable_thinking, "logit_bias": bias, "max_tokens": 200}
    choices: list[Any] = [*({"type": "function", "function": {"name": name}} for name in functions), "required"]
    for choice in choices:
        allowed = functions if choice == "required" else [choice["function"]["name"]]
        result = ask(surfaces, chat(**options, tool_choice=choice, parallel_tool_calls=choice != "required"))
        [answer] = result.choices
        [(name, arguments)] = answer["calls"].values()
        assert (answer["finish"], answer["text"]) == ("tool_calls", "")
        assert name in allowed
        jsonschema.validate(json.loads(arguments), functions[name]["parameters"])


def test_the_prompt_tells_of_tools_and_of_earlier_calls(asked: Asked) -> None:
    chat_format, surfaces = asked
    reply = surfaces.http.post("/tokenize", json={"messages": CALLED, "tools": [PICK, SHORT]}).json()
    prompt = surfaces.http.post("/detokenize", json={"tokens": reply["tokens"]}).json()["prompt"]
    assert chat_format.write_calls([("pick", '{"unit": "C"}')]) in prompt
    assert "done" in prompt
    system = prompt.partition(USER["content"])[0]
    for text in ("pick", "set", "unit", "why"):
        assert text in system


@pytest.mark.parametrize("budget", [0, 5])
def test_a_budget_limits_the_reasoning_that_an_answer_opens_itself(asked: Asked, budget: int) -> None:
    chat_format, surfaces = asked
    tokens = surfaces.http.post("/tokenize", json={"prompt": "<think>", "add_special_tokens": False}).json()["tokens"]
    [think] = tokens
    text = chat(logit_bias={str(think): 100}, thinking_token_budget=budget, max_tokens=20)
    result = ask(surfaces, text)
    [answer] = result.choices
    if chat_format.template.stem in ("deepseek-v3", "qwen3-next"):
        # After `<think>` come `budget` tokens of reasoning, `</think>`, and text up to the maximum length.
        assert answer["reasoning"] == "<think>" * budget
        assert answer["text"] == "<think>" * (20 - 1 - budget - 1)
    else:
        assert answer["reasoning"] == ""
    completion = surfaces.http.post(
        "/v1/completions", json={"prompt": "hi", "logit_bias": {str(think): 100}, "max_tokens": 3}
    ).json()
    assert completion["choices"][0]["text"] == "<think>" * 3, "a completion has no reasoning"


def test_without_a_known_format_chats_are_answered_without_tools(tmp_path: Path) -> None:
    with serving(write_model(tmp_path, CALLLESS)) as surfaces:
        for name in ("chat", "thinking", "tools auto", "tools none", "chat schema"):
            result = ask(surfaces, QUESTIONS[name])
            assert result.error is None, result.error
            assert all(not choice["calls"] for choice in result.choices)
        told = ask(surfaces, QUESTIONS["tools auto"])
        assert told.usage[0] == ask(surfaces, QUESTIONS["chat"]).usage[0], "the model is not told of tools"
        reason = "because the gateway knows no format for calls in the model's chat template."
        strict = {**PICK, "function": PICK["function"] | {"strict": True}}
        for body, message in [
            (QUESTIONS["tools required"], f"tool_choice may not force a call, {reason}"),
            (QUESTIONS["tools named"], f"tool_choice may not force a call, {reason}"),
            (chat(tools=[strict]), f"tools[0].function.strict may not be true, {reason}"),
            (
                QUESTIONS["turns with calls"],
                "messages may not hold the call of 'pick', because the model's chat template does not show earlier "
                "tool calls.",
            ),
        ]:
            result = ask(surfaces, body)
            assert result.error == ("INVALID_ARGUMENT", message)
