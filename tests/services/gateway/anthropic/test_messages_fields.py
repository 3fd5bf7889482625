"""The tests check which fields the Messages API takes: all of the newest `anthropic` client are known."""

from __future__ import annotations

from typing import Any, get_args, get_origin, get_type_hints

import httpx
import pytest
from anthropic.types import (
    ContentBlockParam,
    MessageParam,
    ThinkingConfigParam,
    ToolChoiceParam,
    ToolParam,
    ToolUnionParam,
    message_create_params,
)
from anthropic.types.beta import BetaOutputConfigParam, message_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params

from services.gateway.anthropic.messages_body import CountTokensBody, MessagesBody, OutputConfig
from services.gateway.anthropic.tool_definition import MODES, ToolDefinition
from services.gateway.anthropic.turns import BLOCKS_OF
from tests.services.gateway.conftest import LIMITS

USER: Any = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": "echo", "max_tokens": 9, "messages": [USER]}
TOOL: dict[str, Any] = {"name": "f", "input_schema": {"type": "object"}}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
HEADERS = {"betas", "user_profile_id", "workspace_id"}  # parameters that the client sends as headers
HARMLESS: dict[str, Any] = {
    "cache_control": {"type": "ephemeral"},
    "service_tier": "auto",
    "metadata": {"user_id": "me"},
    "speed": "fast",
    "diagnostics": {"previous_message_id": None},
    "inference_geo": "global",
    "container": None,
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "mcp_servers": [],
    "fallbacks": "default",
    "fallback_credit_token": "x",
    "billing_policy": {"type": "billing_policy", "bill_to": "self"},
    "compaction": None,
    "thread": None,
    "stream": False,
    "stop_sequences": ["x"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "tools": [TOOL | {"defer_loading": True, "eager_input_streaming": True, "allowed_callers": ["direct"]}],
    "tool_choice": None,
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "max", "format": SCHEMA, "task_budget": None},
    "system": [],
}


def fields_of(typed_dict: Any) -> set[str]:
    return set(get_type_hints(typed_dict))


def types_of(union: Any) -> set[str]:
    """Return the values of the field `type` of all types of a union."""
    members = get_args(union) if get_origin(union) is not None else (union,)
    hints = [get_type_hints(member).get("type") for member in members]
    return {value for hint in hints for value in literals(hint)}


def literals(hint: Any) -> list[Any]:
    found = [literals(part) if get_args(part) else [part] for part in get_args(hint)]
    return [value for part in found for value in part if isinstance(value, str)]


def test_every_field_of_the_client_is_known() -> None:
    create = fields_of(message_create_params.MessageCreateParamsStreaming)
    beta = fields_of(beta_create_params.MessageCreateParamsStreaming)
    assert {"messages", "max_tokens", "tools", "mcp_servers"} <= create | beta
    assert (create | beta) - HEADERS <= set(MessagesBody.model_fields)
    assert fields_of(message_count_tokens_params.MessageCountTokensParams) - HEADERS <= set(
        CountTokensBody.model_fields
    )
    assert fields_of(ToolParam) <= set(ToolDefinition.model_fields)
    assert fields_of(BetaOutputConfigParam) <= set(OutputConfig.model_fields)
    assert types_of(ToolChoiceParam) == set(MODES)
    assert {role for union in get_args(MessageParam) for role in literals(get_type_hints(union)["role"])} == set(
        BLOCKS_OF
    )


@pytest.mark.parametrize("name", [*HARMLESS, "output_format"])
def test_fields_that_are_accepted(http: httpx.Client, name: str) -> None:
    for value in (HARMLESS.get(name, SCHEMA), None):
        answer = http.post("/v1/messages", json={**BODY, name: value})
        assert answer.status_code == 200, answer.text
        if name in CountTokensBody.model_fields:
            body = {"model": "echo", "messages": [USER], name: value}
            assert http.post("/v1/messages/count_tokens", json=body).status_code == 200


def test_every_field_is_tried() -> None:
    assert set(MessagesBody.model_fields) - {"model", "messages", "max_tokens", "output_format"} == set(HARMLESS)


def test_headers_of_the_client_are_accepted(http: httpx.Client) -> None:
    headers = {"anthropic-version": "2023-06-01", "x-api-key": "any", "anthropic-beta": "a,b", "authorization": "x"}
    assert http.post("/v1/messages?beta=true", json=BODY, headers=headers).status_code == 200


def blocks(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(content)}]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"colour": 1}, "Unknown field 'colour'; docs/api.md lists the allowed fields."),
    ({"max_tokens": None}, "max_tokens must be a valid integer, not None."),
    ({"max_tokens": 0}, "max_tokens must be at least 1, not 0."),
    ({"temperature": -1}, "temperature must be a finite number of at least 0, not -1.0."),
    ({"top_k": -5}, "top_k must be 1 to 2147483647, or 0 or -1 for the whole vocabulary, not -5."),
    ({"stop_sequences": [""]}, "stop_sequences must be strings of at least one character, not ''."),
    ({"messages": []}, "messages must hold at least one message."),
    ({"messages": 5}, "messages must be a valid array, not 5."),
    ({"messages": ["hi"]}, "messages[0] must be a JSON object."),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role must be 'user', 'assistant' or 'system', not"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing, but required."),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a valid string or a valid array, no"),
    (blocks("hi"), "messages[0].content[0] must be a JSON object"),
    (blocks({"text": "hi"}), "messages[0].content[0].type is missing, but required."),
    (blocks({"type": "text"}), "messages[0].content[0].text is missing, but required."),
    (blocks({"type": "text", "text": 5}), "messages[0].content[0].text must be a valid string, not 5."),
    (blocks({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}),
     "messages[0].content[0].content[0].type must be 'text', not 'image'."),
    (blocks({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text"}]}),
     "messages[0].content[0].content[0].text is missing, but required."),
    (blocks({"type": "tool_use", "id": "x", "name": "f", "input": {}}),
     "messages[0].content[0].type must be one of 'text', 'tool_result' in this role, not 'tool_use'."),
    (blocks({"type": "tool_use", "id": "x", "name": "f", "input": []}, role="assistant"),
     "messages[0].content[0].input must be a JSON object, not []."),
    (blocks({"type": "tool_use", "id": "x", "name": "f", "input": {}}, role="assistant"),
     "messages[0].content must not hold a tool_use block if it is the last message; the results of tools must follow"),
    (blocks({"type": "text", "text": "a"}, {"type": "tool_use", "id": "x", "name": "f", "input": {}}, role="assistant"),
     "messages[0].content must not hold a tool_use block if it is the last message; the results of tools must follow"),
    ({"system": 5}, "system must be a valid string or a valid array, not 5."),
    ({"system": [{"type": "image"}]}, "system[0].type must be 'text', not 'image'."),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing, but required."),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name must be 1 to "),
    ({"tools": [TOOL | {"input_schema": {"type": "array"}}]}, "tools[0].input_schema must be a JSON schema of type"),
    ({"tools": [TOOL | {"allowed_callers": ["code_execution_20260120"]}]}, "tools[0].allowed_callers must hold 'dire"),
    ({"tools": [TOOL, TOOL]}, "tools must hold each function once, but names 'f' twice."),
    ({"tool_choice": {"type": "any"}}, "tool_choice may only be given together with tools."),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "tool_choice may only be given together w"),
    ({"tool_choice": {"type": "required"}}, "tool_choice.type must be 'auto', 'any', 'tool' or 'none', not 'required'"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice must hold a name if, and only if, its type is 'tool'."),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice names the function 'g'; the tools"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type must be 'enabled', 'disabled' or 'adaptive', not 'betwe"),
    ({"thinking": {"type": "enabled"}}, "thinking must hold budget_tokens if, and only if, its type is 'enabled'."),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking must hold budget_tokens of at least 1, not 0."),
    ({"container": "x"}, "container must be null, because nothing else is supported yet, not 'x'."),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers must be [] or null, because nothing else is supported yet"),
    ({"compaction": {}}, "compaction must be null, because nothing else is supported yet"),
    ({"thread": {"type": "create"}}, "thread must be null, because this server keeps no conversations; send all mes"),
    ({"inference_geo": "us"}, 'inference_geo must be "global" or null, because nothing else is supported yet, not '),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
     "context_management.edits[0].type must be 'clear_thinking_20251015', not 'clear_tool_uses_20250919'."),
    ({"output_config": {"task_budget": {"type": "tokens"}}}, "output_config.task_budget must be null, because"),
    ({"output_config": {"effort": "none"}}, "output_config.effort must be 'low', 'medium', 'high', 'xhigh' or 'max',"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
     "output_config.format.schema cannot be used: "),
    ({"output_format": SCHEMA, "output_config": {"format": SCHEMA}}, "output_format may not be given together with"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), BAD)
def test_bad_requests(http: httpx.Client, more: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/messages", json=BODY | more)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(message), error["message"]
    assert error["message"].endswith(".")


def test_the_number_of_messages_and_blocks_is_limited(http: httpx.Client) -> None:
    most = LIMITS.input_items
    message = f"messages must hold at most {most} messages and content blocks, not {most + 1}."
    result = {"type": "tool_result", "tool_use_id": "x", "content": [0] * (most - 1)}
    bodies: list[dict[str, Any]] = [blocks(*[0] * most), blocks(result), {"system": [0] * most}]
    for more in (*bodies, {"messages": [0] * (most + 1)}):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            body = {"model": "echo", **({"max_tokens": 9} if path == "/v1/messages" else {})}
            answer = http.post(path, json=body | {"messages": [USER]} | more)
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    many = {"model": "echo", "messages": [USER] * 600}  # a thread reads so many messages
    assert http.post("/v1/messages/count_tokens", json=many).json()["input_tokens"] > 600


def test_types_that_only_anthropic_serves_are_named(http: httpx.Client) -> None:
    known = {type_ for types in BLOCKS_OF.values() for type_ in types}
    others = types_of(ContentBlockParam) - known
    assert {"image", "document"} <= others
    for type_ in others:
        answer = http.post("/v1/messages", json=BODY | blocks({"type": type_}))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("messages[0].content[0].type must be one of 'text', ")
        assert answer.json()["error"]["message"].endswith(f"not '{type_}'.")
    tools = types_of(ToolUnionParam) - {"custom"}
    assert {"bash_20250124", "web_search_20250305"} <= tools
    for type_ in tools:
        answer = http.post("/v1/messages", json=BODY | {"tools": [{"type": type_, "name": "x", "max_uses": 1}]})
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            400,
            f"tools[0].type must be 'custom', not '{type_}'.",
        )
    assert types_of(ThinkingConfigParam) == {"enabled", "disabled", "adaptive", "between_tools"}
