"""The tests check that REST and gRPC, streamed and not streamed, give equal responses for every parameter.

Refusals must be equal, too. The tests run a real engine with the demo model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.gateway.metrics.backbone_metrics import backbone_metrics
from tests.services.application import wait_until
from tests.services.gateway.messages_surface import as_message, ask_messages, to_messages
from tests.services.gateway.responses_surface import as_response, ask_responses, to_question
from tests.services.gateway.surfaces import MAX_LEN, SurfaceResponse, Surfaces, comparable, serving, to_grpc
from tests.services.gateway.weather import NOW, WEATHER

PROMPT = "    def close(self):"
LONG_PROMPT = "import os\n" * 60
USER = {"role": "user", "content": "def read(self):"}
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "ok": {"type": "boolean"}},
    "required": ["unit", "ok"],
    "additionalProperties": False,
}
SHORT = {
    "type": "function",
    "function": {"name": "set", "parameters": SCHEMA | {"properties": {"unit": {"enum": ["C", "F"]}}, "required": []}},
}
PICK = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["C", "F"]},
                "ok": {"type": "boolean"},
                "why": {"type": "string", "maxLength": 8},
            },
            "required": ["unit", "ok"],
        },
    },
}
WEATHER_TOOL = WEATHER.to_template()
CALLED: list[dict[str, Any]] = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "so",
        "tool_calls": [{"id": "c1", "function": {"name": "pick", "arguments": '{"unit": "C"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "done"},
]

BEGUN = [USER, {"role": "assistant", "content": "    return self."}]


def completion(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}


def chat(**more: Any) -> dict[str, Any]:
    return {"messages": [USER], "max_tokens": 12, "temperature": 0, **more}


SAMPLED = {"temperature": 1.0, "seed": 3}
ANSWERS: dict[str, dict[str, Any]] = {
    "greedy": completion(),
    "token ids": completion(prompt=[100, 200, 300]),
    "to the end of the context": completion(max_tokens=100_000, prompt="x = 1\n" * 80, ignore_eos=True),
    "no limit": completion(max_tokens=-1, prompt="x = 1\n" * 80, ignore_eos=True),
    "truncated prompt": completion(prompt=LONG_PROMPT, truncate_prompt_tokens=9, echo=True),
    "prompt truncated to fit": completion(prompt="x = 1\n" * 400, truncate_prompt_tokens=-1),
    "stop string shown": completion(stop=["self", "return"], include_stop_str_in_output=True, max_tokens=40),
    "special tokens": chat(skip_special_tokens=False, include_stop_str_in_output=True, max_tokens=100),
    "final message": chat(messages=BEGUN, continue_final_message=True, add_generation_prompt=False),
    "no generation prompt": chat(add_generation_prompt=False),
    "budget": chat(enable_thinking=True, thinking_token_budget=3),
    "default length": {"prompt": PROMPT, "temperature": 0},
    "model": completion(model="demo"),
    "seed": completion(**SAMPLED),
    "temperature": completion(temperature=0.3, seed=-5),
    "top_p": completion(top_p=0.5, **SAMPLED),
    "top_p 0": completion(top_p=0, **SAMPLED),
    "top_k": completion(top_k=3, **SAMPLED),
    "min_p": completion(min_p=0.2, **SAMPLED),
    "presence_penalty": completion(presence_penalty=1.5, **SAMPLED),
    "frequency_penalty": completion(frequency_penalty=-1.5),
    "repetition_penalty": completion(repetition_penalty=1.7),
    "logit_bias": completion(logit_bias={"300": 100, "301": -100}),
    "stop": completion(stop=["self", "return"], max_tokens=40),
    "stop over tokens": completion(stop=["f.t"], max_tokens=40),
    "stop_token_ids": completion(stop_token_ids=[200, 201, 202, 203, 204, 205, 206, 207], ignore_eos=True),
    "ignore_eos": completion(ignore_eos=True),
    "min_tokens": completion(min_tokens=12, stop=["s"]),
    "n": completion(n=3, **SAMPLED),
    "n greedy": completion(n=2),
    "logprobs 0": completion(logprobs=0),
    "logprobs": completion(logprobs=5),
    "logprobs and n": completion(logprobs=1, n=2, **SAMPLED),
    "logprobs and stop": completion(logprobs=1, stop=["self"], max_tokens=40),
    "echo": completion(echo=True),
    "echo with logprobs": completion(echo=True, logprobs=2),
    "echo alone": completion(echo=True, logprobs=0, max_tokens=0),
    "priority": completion(priority=-2),
    "cache_salt": completion(cache_salt="mine", prompt=LONG_PROMPT),
    "timeout": completion(timeout=60.0),
    "long prompt": completion(prompt=LONG_PROMPT),
    "regex": completion(structured_outputs={"regex": "[a-f]{4}"}, **SAMPLED),
    "choice": completion(structured_outputs={"choice": ["left", "right"]}, logprobs=1),
    "grammar": completion(structured_outputs={"grammar": 'start: "x" /[0-9]{3}/'}, **SAMPLED),
    "json_schema": completion(
        response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}, max_tokens=250, **SAMPLED
    ),
    "json_object": completion(response_format={"type": "json_object"}, max_tokens=30),
    "chat": chat(),
    "chat sampled": chat(**SAMPLED),
    "chat logprobs": chat(logprobs=True, top_logprobs=3),
    "chat n": chat(n=2, **SAMPLED),
    "chat stop": chat(stop=["\n"], max_tokens=40),
    "system": chat(messages=[{"role": "system", "content": "be brief"}, USER], top_k=1),
    "chat schema, greedy": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}, max_tokens=250
    ),
    "tools required, greedy": chat(tools=[PICK], tool_choice="required", max_tokens=120),
    "roles": chat(messages=[{"role": "developer", "content": "be brief"}, {**USER, "name": "me"}]),
    "turns with calls": chat(messages=CALLED),
    "thinking": chat(enable_thinking=True),
    "thinking by kwargs": chat(chat_template_kwargs={"enable_thinking": True}, **SAMPLED),
    "reasoning effort": chat(reasoning_effort="low"),
    "no reasoning": chat(reasoning_effort="none"),
    "thinking then form": chat(
        enable_thinking=True, logit_bias={"6": 60}, structured_outputs={"choice": ["yes", "no"]}, max_tokens=60
    ),
    "chat schema": chat(
        response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}, max_tokens=250, **SAMPLED
    ),
    "tools auto": chat(tools=[PICK]),
    "no parallel tools": chat(parallel_tool_calls=False),
    "tools none": chat(tools=[PICK], tool_choice="none"),
    "tools required": chat(tools=[PICK], tool_choice="required", max_tokens=120, **SAMPLED),
    "tools named": chat(
        tools=[PICK, SHORT], tool_choice={"type": "function", "function": {"name": "set"}}, max_tokens=80
    ),
    "tools one": chat(tools=[PICK], tool_choice="required", parallel_tool_calls=False, max_tokens=120),
    "tools cut off": chat(tools=[WEATHER_TOOL], tool_choice="required", max_tokens=30),
    "tools after thinking": chat(
        tools=[SHORT],
        tool_choice="required",
        parallel_tool_calls=False,
        enable_thinking=True,
        logit_bias={"6": 60},
        max_tokens=120,
    ),
}
REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "model": (completion(model="gpt"), "NOT_FOUND", "The model 'gpt' does not exist; this server serves 'demo'."),
    "context": (
        completion(prompt="x = 1\n" * 400),
        "INVALID_ARGUMENT",
        "This model's maximum context length is 512 tokens. However, your prompt resulted in ",
    ),
    "max_tokens": (completion(max_tokens=0), "INVALID_ARGUMENT", "max_tokens must be at least 1, not 0."),
    "temperature": (completion(temperature=-1), "INVALID_ARGUMENT", "temperature must be a finite number of at lea"),
    "cache_salt": (completion(cache_salt="a" * 129), "INVALID_ARGUMENT", "cache_salt must be at most 128 characters"),
    "top_p": (completion(top_p=-1), "INVALID_ARGUMENT", "top_p must be 0 to 1, not -1.0."),
    "top_k": (completion(top_k=-2), "INVALID_ARGUMENT", "top_k must be 1 to "),
    "min_p": (completion(min_p=2), "INVALID_ARGUMENT", "min_p must be 0 to 1, not 2.0."),
    "penalty": (completion(presence_penalty=2.5), "INVALID_ARGUMENT", "presence_penalty must be -2 to 2, not 2.5."),
    "repetition": (completion(repetition_penalty=-1), "INVALID_ARGUMENT", "repetition_penalty must be a finite num"),
    "n": (completion(n=0), "INVALID_ARGUMENT", "n must be 1 to 128, not 0."),
    "min_tokens": (
        completion(min_tokens=13),
        "INVALID_ARGUMENT",
        "min_tokens must be at most max_tokens (12), not 13.",
    ),
    "logprobs": (completion(logprobs=21), "INVALID_ARGUMENT", "logprobs must be 0 to 20, not 21."),
    "bias": (completion(logit_bias={"2048": 1}), "INVALID_ARGUMENT", "logit_bias holds the token id 2048; allowed"),
    "bias entries": (
        completion(logit_bias={str(n): 1 for n in range(1025)}),
        "INVALID_ARGUMENT",
        "logit_bias must hold at most 1024 tokens, not 1025.",
    ),
    "bias size": (completion(logit_bias={"1": 101}), "INVALID_ARGUMENT", "logit_bias must be -100 to 100 for each"),
    "stop ids": (completion(stop_token_ids=[9999]), "INVALID_ARGUMENT", "stop_token_ids holds the token id 9999;"),
    "stop": (completion(stop=[""]), "INVALID_ARGUMENT", "stop must be strings of at least one character, not ''."),
    "timeout": (completion(timeout=-1.0), "INVALID_ARGUMENT", "timeout must be a number of seconds above 0, not -1.0."),
    "prompt ids": (completion(prompt=[5, 5000]), "INVALID_ARGUMENT", "prompt holds the token id 5000; allowed are 0"),
    "regex": (completion(structured_outputs={"regex": "a("}), "INVALID_ARGUMENT", "structured_outputs.regex cannot be"),
    "grammar": (completion(structured_outputs={"grammar": "start: a"}), "INVALID_ARGUMENT", "structured_outputs.gram"),
    "schema": (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}),
        "INVALID_ARGUMENT",
        "response_format.json_schema.schema cannot be used: type must be one or more of array, ",
    ),
    "no messages": (chat(messages=[]), "INVALID_ARGUMENT", "messages must hold at least one message."),
    "tool turn": (
        chat(messages=[{"role": "tool", "content": "x"}]),
        "INVALID_ARGUMENT",
        "messages[0].tool_call_id must be given where the role is 'tool', and only there.",
    ),
    "kwargs": (
        chat(chat_template_kwargs={"tokenize": True}),
        "INVALID_ARGUMENT",
        "chat_template_kwargs must not hold 'tokenize', which the server itself sets.",
    ),
    "thinking": (
        chat(chat_template_kwargs={"enable_thinking": True}, enable_thinking=False),
        "INVALID_ARGUMENT",
        "enable_thinking must not contradict enable_thinking in chat_template_kwargs; set only one.",
    ),
    "reasoning effort": (
        chat(reasoning_effort="much"),
        "INVALID_ARGUMENT",
        "reasoning_effort must be 'none', 'minimal', 'low', 'medium', 'high', 'xhigh' or 'max', not 'much'.",
    ),
    "budget without reasoning": (
        chat(reasoning_effort="none", thinking_token_budget=9),
        "INVALID_ARGUMENT",
        "thinking_token_budget may not be given if reasoning_effort is 'none'.",
    ),
    "truncation": (
        completion(truncate_prompt_tokens=512),
        "INVALID_ARGUMENT",
        "truncate_prompt_tokens must be 1 to 511, or -1 for all that fit, not 512.",
    ),
    "final message of a user": (
        chat(continue_final_message=True),
        "INVALID_ARGUMENT",
        "continue_final_message needs a last message of the assistant without tool_calls.",
    ),
    "final message and generation prompt": (
        chat(messages=BEGUN, continue_final_message=True, add_generation_prompt=True),
        "INVALID_ARGUMENT",
        "continue_final_message may not be true together with add_generation_prompt.",
    ),
    "stop strings": (completion(stop=list("abcde")), "INVALID_ARGUMENT", "stop must hold at most 4 strings, not 5."),
    "bias of many": (
        completion(logit_bias={str(n): 1 for n in range(1025)}),
        "INVALID_ARGUMENT",
        "logit_bias must hold at most 1024 ",
    ),
    "logprobs of many": (
        completion(prompt=[1] * 500, n=13, echo=True, logprobs=20),
        "INVALID_ARGUMENT",
        "prompt_logprobs (or echo with logprobs) may ask for at most 49152 logprobs, which are tokens times n times",
    ),
    "no tools": (
        chat(tool_choice="required"),
        "INVALID_ARGUMENT",
        "tool_choice may only be given together with tools.",
    ),
    "other tool": (
        chat(tools=[PICK], tool_choice={"type": "function", "function": {"name": "x"}}),
        "INVALID_ARGUMENT",
        "tool_choice names the function 'x'; the tools are 'pick'.",
    ),
    "tool twice": (
        chat(tools=[PICK, PICK]),
        "INVALID_ARGUMENT",
        "tools must hold each function once, but names 'pick'",
    ),
    "form and call": (
        chat(tools=[PICK], tool_choice="required", response_format={"type": "json_object"}),
        "INVALID_ARGUMENT",
        "response_format may not be given together with a tool_choice that forces a call.",
    ),
    "tool schema": (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]),
        "INVALID_ARGUMENT",
        "tools[0].function.parameters must be a JSON schema of type 'object'.",
    ),
}


def test_the_api_reference_tells_the_number_of_questions() -> None:
    text = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    assert f"A test asks {len(ANSWERS) + len(REFUSALS)} questions" in text


@pytest.fixture(scope="module")
def surfaces() -> Iterator[Surfaces]:
    with serving() as surfaces:
        yield surfaces


def ask(surfaces: Surfaces, body: dict[str, Any]) -> SurfaceResponse:
    """Return the response to `body`, and check that REST and gRPC, streamed and not streamed, give equal responses."""
    is_chat, echoes = "messages" in body, "echo" in body
    results = {way: comparable(result, is_chat, echoes) for way, result in surfaces.ask_all(body).items()}
    for way, result in results.items():
        assert result == results["rest"], way
    for way, result in ask_responses(surfaces.http, body).items():
        assert result == as_response(results["rest"]), way
    for way, result in ask_messages(surfaces.http, body).items():
        assert result == as_message(results["rest"]), way
    return results["rest"]


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(surfaces: Surfaces, name: str) -> None:
    body = ANSWERS[name]
    result = ask(surfaces, body)
    assert result.error is None, result.error
    assert result.request_id == "same"
    assert len(result.choices) == body.get("n", 1)
    most = body.get("max_tokens", 16)
    assert result.usage[1] <= (MAX_LEN if most == -1 else most) * body.get("n", 1)
    for choice in result.choices:
        assert choice["finish"] in ("stop", "length", "tool_calls")
        assert bool(choice["logprobs"]) == ("logprobs" in body)
        if "logprobs" in body and "echo" not in body and body.get("n", 1) == 1:
            assert len(choice["logprobs"]) == result.usage[1], "one entry for each token, the end token included"
        assert "\ufffd" not in choice["text"]
    # The gateway and not the engine finds stop strings. The engine therefore ends a request with a stop string only in
    # the next step.
    assert wait_until(lambda: surfaces.backbone.engine.stats().num_running == 0, 5)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(surfaces: Surfaces, name: str) -> None:
    body, code, message = REFUSALS[name]
    result = ask(surfaces, body)
    assert result.error is not None
    assert result.error[0] == code
    assert result.error[1].startswith(message), result.error[1]


def test_the_responses_api_is_asked_what_it_can_express() -> None:
    asked = {name for name, body in ANSWERS.items() if to_question(body) is not None}
    assert {"chat", "chat sampled", "chat logprobs", "turns with calls", "thinking", "chat schema"} <= asked
    assert {name for name in ANSWERS if name.startswith("tools ")} <= asked
    refused = {name for name, (body, _, _) in REFUSALS.items() if to_question(body) is not None}
    assert {"schema", "thinking", "other tool", "tool schema", "no tools", "form and call", "kwargs"} <= refused


def test_the_messages_api_is_asked_what_it_can_express() -> None:
    asked = {name for name, body in ANSWERS.items() if to_messages(body) is not None}
    assert {"chat", "chat stop", "system", "turns with calls", "thinking", "tools cut off", "tools one"} <= asked
    refused = {name for name, (body, _, _) in REFUSALS.items() if to_messages(body) is not None}
    assert {"schema", "no messages", "other tool", "tool schema", "no tools"} <= refused


@pytest.mark.parametrize("way", ["rest", "grpc"])
def test_a_deadline_that_passes(surfaces: Surfaces, way: str) -> None:
    body = completion(timeout=0.2, max_tokens=400, ignore_eos=True)
    result = surfaces.rest(body, False) if way == "rest" else surfaces.grpc(body, False)
    assert result.error is not None
    assert result.error[0] == "DEADLINE_EXCEEDED"
    assert result.error[1].startswith("The request's deadline passed after ")


def test_parameters_have_an_effect(surfaces: Surfaces) -> None:
    """Check that parameters change the text; equal responses alone would not show that a parameter is used."""
    text = {name: ask(surfaces, ANSWERS[name]).choices[0]["text"] for name in ("greedy", "seed", "logit_bias")}
    assert len(set(text.values())) == 3
    changed = ("top_p", "top_k", "min_p", "presence_penalty")
    assert sum(surfaces.rest(ANSWERS[name], False).choices[0]["text"] != text["seed"] for name in changed) >= 2
    assert surfaces.rest(ANSWERS["repetition_penalty"], False).choices[0]["text"] != text["greedy"]
    choices = surfaces.rest(ANSWERS["n"], False).choices
    assert choices[0]["text"] == text["seed"]
    assert len({choice["text"] for choice in choices}) == 3
    stopped = surfaces.rest(ANSWERS["stop"], False).choices[0]
    assert stopped["finish"] == "stop"
    assert not any(stop in stopped["text"] for stop in ("self", "return"))
    echoed = surfaces.rest(ANSWERS["echo"], False).choices[0]
    assert echoed["text"] == PROMPT + text["greedy"]
    assert ask(surfaces, ANSWERS["long prompt"]).usage[2] > 0


@pytest.mark.parametrize("name", ["to the end of the context", "no limit"])
def test_an_answer_ends_with_the_context(surfaces: Surfaces, name: str) -> None:
    result = surfaces.rest(ANSWERS[name], False)
    assert result.choices[0]["finish"] == "length"
    assert sum(result.usage[:2]) == MAX_LEN


@pytest.mark.parametrize("body", [completion(return_token_ids=True, n=2), chat(return_token_ids=True)])
def test_token_ids(surfaces: Surfaces, body: dict[str, Any]) -> None:
    """Check that all surfaces report the same tokens of prompt and answer, each token of an answer once."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    reply = surfaces.stub.Generate(to_grpc(body))
    expected = [(list(choice.prompt_token_ids), list(choice.token_ids)) for choice in reply.choices]
    assert all(prompt and answer for prompt, answer in expected)
    whole = surfaces.http.post(path, json=body).json()
    prompts = [whole.get("prompt_token_ids") or choice["prompt_token_ids"] for choice in whole["choices"]]
    assert list(zip(prompts, [choice["token_ids"] for choice in whole["choices"]], strict=True)) == expected
    streamed: dict[int, tuple[list[int], list[int]]] = {}
    for line in surfaces.http.post(path, json={**body, "stream": True}).text.split("\n\n"):
        if line and "[DONE]" not in line:
            chunk = json.loads(line.removeprefix("data: "))
            [choice] = chunk["choices"]
            prompt, answer = streamed.setdefault(choice["index"], ([], []))
            prompt += chunk.get("prompt_token_ids", []) + choice.get("prompt_token_ids", [])
            answer += choice.get("token_ids", [])
    assert [streamed[index] for index in sorted(streamed)] == expected
    assert "token_ids" not in surfaces.http.post(path, json={**body, "return_token_ids": None}).text


def test_new_parameters_have_an_effect(surfaces: Surfaces) -> None:
    def text(name: str) -> str:
        return str(surfaces.rest(ANSWERS[name], False).choices[0]["text"])

    assert text("stop string shown") == text("stop") + next(
        stop for stop in ("self", "return") if text("stop string shown").endswith(stop)
    )
    assert text("truncated prompt").startswith(LONG_PROMPT[-20:])
    budget = surfaces.http.post("/v1/chat/completions", json=ANSWERS["budget"]).json()
    assert budget["usage"]["completion_tokens_details"]["reasoning_tokens"] == 4  # three, and the token that ends them
    assert surfaces.grpc(ANSWERS["budget"], False).choices[0]["text"]


def test_forms_are_kept(surfaces: Surfaces) -> None:
    def text(name: str) -> str:
        choice = surfaces.rest(ANSWERS[name], False).choices[0]
        assert choice["finish"] == "stop"
        return str(choice["text"])

    assert set(text("regex")) <= set("abcdef")
    assert text("choice") in ("left", "right")
    assert text("grammar")[1:].isdecimal()
    for name in ("json_schema", "chat schema"):
        answer = json.loads(text(name))
        assert answer["unit"] in ("C", "F")
        assert isinstance(answer["ok"], bool)
    assert text("thinking then form") in ("yes", "no")


def test_even_the_demo_model_calls_tools(surfaces: Surfaces) -> None:
    for name, function in [("tools named", "set"), ("tools one", "pick"), ("tools after thinking", "set")]:
        choice = surfaces.rest(ANSWERS[name], False).choices[0]
        assert choice["finish"] == "tool_calls", name
        assert choice["text"] == ""
        called, arguments = choice["calls"][0]
        assert called == function
        assert json.loads(arguments).get("unit", "C") in ("C", "F")


def test_metrics_of_the_engine(surfaces: Surfaces) -> None:
    ask(surfaces, ANSWERS["long prompt"])
    registry = backbone_metrics("demo", [{**surfaces.backbone.status(), "endpoint": "a:1"}])
    lines = generate_latest(registry).decode().splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def value(name: str, **labels: str) -> float:
        label_text = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
        return values[f"expertmesh:{name}{{{label_text}}}"]

    model = {"model_name": "demo", "backbone": "a:1"}
    assert 0 < value("prefix_cache_hits_total", **model) < value("prefix_cache_queries_total", **model)
    assert value("engine_prefix_cache_requests_total", **model, reason="hit") > 0
    drafted = value("spec_decode_num_draft_tokens_total", **model)
    assert drafted >= value("spec_decode_num_accepted_tokens_total", **model) > 0
    assert 0 < value("spec_decode_num_draft_tokens_per_pos_total", **model, position="0") <= drafted
    assert value("num_requests_running", **model) == value("kv_cache_usage_perc", **model) == 0


def test_tokenize_detokenize_and_models(surfaces: Surfaces) -> None:
    rest = surfaces.http.post("/tokenize", json={"prompt": "naïve 🦜", "return_token_strs": True}).json()
    grpc = surfaces.stub.Tokenize(pb.TokenizeRequest(text="naïve 🦜"))
    assert list(grpc.token_ids) == rest["tokens"]
    assert not grpc.token_texts
    asked = pb.TokenizeRequest(text="naïve 🦜", return_token_strs=True)
    assert list(surfaces.stub.Tokenize(asked).token_texts) == rest["token_strs"]
    assert grpc.max_model_len == rest["max_model_len"]
    assert surfaces.stub.Detokenize(pb.DetokenizeRequest(token_ids=grpc.token_ids)).text == "naïve 🦜"
    assert surfaces.http.post("/detokenize", json={"tokens": rest["tokens"]}).json() == {"prompt": "naïve 🦜"}
    tools = [{"type": "function", "function": NOW.to_template()["function"]}]
    chat = surfaces.http.post("/tokenize", json={"messages": [USER], "tools": tools}).json()
    grpc_chat = pb.Chat(messages=[pb.ChatMessage(**USER)], tools=[pb.Tool(name="now")])
    assert list(surfaces.stub.Tokenize(pb.TokenizeRequest(chat=grpc_chat)).token_ids) == chat["tokens"]
    model = surfaces.http.get("/v1/models/demo").json()
    named = surfaces.stub.GetModel(pb.GetModelRequest(id="demo"))
    assert (named.id, named.max_model_len) == (model["id"], model["max_model_len"])
    assert list(surfaces.stub.ListModels(pb.ListModelsRequest()).models) == [named]
