from __future__ import annotations

from typing import Any, get_args

import httpx
import openai
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from openai.types.responses.response_includable import ResponseIncludable

from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.responses.body import ResponsesBody
from tests.services.gateway.echo import EOS, EchoSource
from tests.services.gateway.responses.conftest import create

NO_TYPE = "type must be one or more of array, boolean, integer, null, number, object, string, not 'x'."


def test_every_field_of_openais_reference_is_known() -> None:
    assert set(ResponseCreateParamsStreaming.__annotations__) - set(ResponsesBody.model_fields) == set()


def test_hints_and_nulls_are_accepted(client: openai.OpenAI, http: httpx.Client) -> None:
    nulls = {name: None for name in ResponseCreateParamsStreaming.__annotations__ if name != "input"}
    assert http.post("/v1/responses", json={"input": "hi", **nulls}).status_code == 200
    hints: dict[str, Any] = {
        "background": False, "context_management": [], "include": list(get_args(ResponseIncludable)),
        "max_tool_calls": 3, "parallel_tool_calls": True, "prompt_cache_key": "k", "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "implicit"}, "reasoning": {"summary": "auto", "context": "auto"},
        "safety_identifier": "s", "service_tier": "auto", "stream_options": {"include_obfuscation": False},
        "text": {"verbosity": "low"}, "tool_choice": "auto", "truncation": "disabled", "user": "u",
    }  # fmt: skip
    answer = create(client, extra_body=hints)
    assert answer.output_text == "user\nhi"
    assert (answer.prompt_cache_key, answer.safety_identifier, answer.user) == ("k", "s", "u")


# vLLM's own fields of a response with their defaults (vllm/entrypoints/openai/responses/protocol.py)
VLLM: dict[str, Any] = {
    "cache_salt": None, "enable_response_messages": False, "ignore_eos": False, "include_stop_str_in_output": False,
    "logit_bias": None, "mm_processor_kwargs": None, "previous_input_messages": None, "previous_response": None,
    "priority": 0, "repetition_penalty": None, "request_id": None, "seed": None, "skip_special_tokens": True,
    "stop": [], "structured_outputs": None, "top_k": None, "vllm_xargs": None,
}  # fmt: skip


def test_vllms_fields(client: openai.OpenAI, http: httpx.Client, source: EchoSource, tokenizer: Tokenizer) -> None:
    assert create(client, extra_body=VLLM).output_text == "user\nhi"
    assert http.post("/v1/responses", json={"input": "hi", **dict.fromkeys(VLLM)}).status_code == 200
    source.script = tokenizer.encode("one two")
    assert create(client, extra_body={"stop": "two"}).output_text == "one "
    assert create(client, extra_body={"stop": ["two"], "include_stop_str_in_output": True}).output_text == "one two"
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert create(client, extra_body=shown).output_text == "one two" + EOS
    create(client, extra_body={"structured_outputs": {"regex": "one two"}})
    assert source.seen[-1].grammar is not None


def test_unknown_fields_of_items_are_ignored(client: openai.OpenAI) -> None:
    item: Any = {"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}, {"type": "input_text", "text":
                 "b", "cache_control": {}}], "phase": None, "x": 2}  # fmt: skip
    assert create(client, input=[item]).output_text == "user\nab"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input is missing, but required."),
    "empty input": ({"input": []}, "input must hold at least one message."),
    "kind of input": ({"input": 5}, "input must be a string or a list of items, not 5."),
    "item": ({"input": ["x"]}, "input[0] must be a JSON object."),
    "item type": ({"input": [{"type": "computer_call"}]}, "input[0].type must be one of 'message', 'function_call', "),
    "role": ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role must be one of 'user', 'assistant', "),
    "content": ({"input": [{"role": "user"}]}, "input[0].content is missing, but required."),
    "image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type must be 'input_text' or 'output_text' or 'text' or 'refusal', because the model",
    ),
    "call": ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id is missing, but required."),
    "arguments": (
        {"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "[]"}]},
        "input[0].arguments must be a JSON object as a string, not '[]'.",
    ),
    "output": ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output is missing, but req"),
    "reference": ({"input": [{"id": "msg_1"}]}, "The item 'msg_1' is not stored here: a gateway keeps only"),
    "unknown field": ({"max_tokens": 5}, "Unknown field 'max_tokens'; "),
    "built-in tool": (
        {"tools": [{"type": "web_search"}]},
        "tools[0].type must be 'function', because the server has no built-in tools, not 'web_search'.",
    ),
    "tool name": ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name must be 1 to 64 letters"),
    "tool schema": (
        {"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]},
        "tools[0].parameters must be a JSON schema of type 'object'.",
    ),
    "choice": ({"tool_choice": "all"}, "tool_choice must be 'auto', 'none', 'required' or name a function, not 'all'."),
    "choice type": ({"tool_choice": {"type": "mcp"}}, "tool_choice.type must be 'function' or 'allowed_tools'"),
    "choice name": ({"tool_choice": {"type": "function"}}, "tool_choice must name one function, as "),
    "allowed mode": ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice must hold allowed_tools as "),
    "forced without tools": ({"tool_choice": "required"}, "tool_choice may only be given together with tools."),
    "format": (
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        "text.format must hold a schema if, and only if, its type is 'json_schema'.",
    ),
    "schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}},
        f"text.format.schema cannot be used: {NO_TYPE}",
    ),
    "two forms": (
        {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
        "structured_outputs may not be given together with text.format; give one.",
    ),
    "structured_outputs": (
        {"structured_outputs": {"regex": "("}},
        "structured_outputs.regex cannot be used: ",
    ),
    "stop": ({"stop": [""]}, "stop must be strings of at least one character, not ''."),
    "vLLM's request_id": ({"request_id": "resp_1"}, "request_id must be null, because nothing else is supported yet"),
    "include": ({"include": ["x"]}, "include[0] must be one of 'code_interpreter_call.outputs', "),
    "effort": ({"reasoning": {"effort": "x"}}, "reasoning.effort must be 'none', 'minimal', "),
    "max_output_tokens": ({"max_output_tokens": 0}, "max_output_tokens must be at least 1, not 0."),
    "top_logprobs": ({"top_logprobs": 21}, "top_logprobs must be 0 to 20, not 21."),
    "background": ({"background": True}, "background must be false or null, because nothing else"),
    "conversation": ({"conversation": "c"}, "conversation must be null, because nothing else is supported yet, not"),
    "template": ({"input": "refuse"}, "input do not fit the model's chat template"),
    "model": ({"model": "x"}, "The model 'x' does not exist; this server serves 'echo'."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(http: httpx.Client, name: str) -> None:
    body, message = REFUSED[name]
    for path in ("", "/input_tokens"):
        if path and name in ("schema", "max_output_tokens", "top_logprobs", "structured_outputs", "stop"):
            continue  # these concern the answer, and no answer is generated to count the tokens of an input
        answer = http.post(f"/v1/responses{path}", json={"input": "hi", **body})
        error = answer.json()["error"]
        assert answer.status_code == (404 if name in ("reference", "model") else 400)
        assert error["message"].startswith(message), error["message"]
