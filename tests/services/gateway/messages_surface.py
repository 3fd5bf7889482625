"""`ask_messages` asks a question for chat completions through Anthropic's Messages API, streamed and not streamed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pydantic_core

from services.gateway.anthropic.refusals import PARAM_NAMES
from services.gateway.errors import invalid
from tests.services.gateway.surfaces import CODES, SurfaceResponse

SAME = {"model", "max_tokens", "temperature", "top_p", "top_k"}  # fields that are equal in both APIs
CONVERTED = {"messages", "stop", "tools", "tool_choice", "parallel_tool_calls", "enable_thinking", "response_format"}
CHOICES = {"auto": "auto", "none": "none", "required": "any"}
FINISHES = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
FORMAT = "response_format.json_schema.schema"


def ask_messages(http: httpx.Client, body: dict[str, Any]) -> dict[str, SurfaceResponse]:
    """Return the responses to the body of a chat, or no responses if the Messages API cannot express the body."""
    question = to_messages(body)
    if question is None:
        return {}
    return {f"messages, stream={stream}": _ask(http, question | {"stream": stream}) for stream in (False, True)}


def as_message(result: SurfaceResponse) -> SurfaceResponse:
    """Return the response of another surface in the words and form of the Messages API.

    Arguments of calls are objects; of a call that was cut off, only the complete arguments are left.
    """
    if result.error is not None:
        code, sentence = result.error
        renamed = invalid(sentence.replace(FORMAT, "output_config.format.schema")).renamed(PARAM_NAMES)
        return replace(result, error=(code, renamed.message))
    return replace(result, choices=[one | {"calls": _parsed(one["calls"])} for one in result.choices])


def _parsed(calls: dict[int, tuple[str, str]]) -> list[Any]:
    return [(name, pydantic_core.from_json(text or "{}", allow_partial=True)) for name, text in calls.values()]


def to_messages(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the body of the same question for the Messages API, or None if the API cannot express the question."""
    turns = [_turn(message) for message in body.get("messages", [])]
    has_format = body.get("response_format", {}).get("type") in (None, "json_schema")
    has_choice = "tools" in body or "parallel_tool_calls" not in body
    is_expressible = "messages" in body and "max_tokens" in body and body.keys() <= SAME | CONVERTED
    if not is_expressible or not has_format or not has_choice or None in turns:
        return None
    question = {"model": "demo"} | {name: value for name, value in body.items() if name in SAME}
    if turns and body["messages"][0]["role"] in ("system", "developer"):
        question["system"] = body["messages"][0]["content"]
        turns = turns[1:]
    question["messages"] = turns
    question["thinking"] = {"type": "adaptive" if body.get("enable_thinking") else "disabled"}
    if "stop" in body:
        question["stop_sequences"] = body["stop"]
    if "response_format" in body:
        schema = body["response_format"]["json_schema"]["schema"]
        question["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    return question | _tools(body)


def _tools(body: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "tools" in body:
        functions = [tool["function"] for tool in body["tools"]]
        fields["tools"] = [
            {"name": function["name"], "input_schema": function.get("parameters", {})}
            | {key: function[key] for key in ("description", "strict") if key in function}
            for function in functions
        ]
    choice = body.get("tool_choice", "auto")
    is_named = isinstance(choice, dict)
    chosen = {"type": "tool", "name": choice["function"]["name"]} if is_named else {"type": CHOICES[choice]}
    if "parallel_tool_calls" in body:
        chosen["disable_parallel_tool_use"] = not body["parallel_tool_calls"]
    return fields | ({"tool_choice": chosen} if {"tool_choice", "parallel_tool_calls"} & body.keys() else {})


def _turn(message: dict[str, Any]) -> dict[str, Any] | None:
    if message.keys() - {"role", "content", "reasoning_content", "tool_calls", "tool_call_id"}:
        return None
    if message["role"] == "tool":
        block = {"type": "tool_result", "content": message["content"], "tool_use_id": message.get("tool_call_id")}
        return {"role": "user", "content": [block]} if "tool_call_id" in message else None
    blocks: list[dict[str, Any]] = []
    if "reasoning_content" in message:
        blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", []):
        function = call["function"]
        arguments = json.loads(function["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return {"role": message["role"], "content": blocks}


def _ask(http: httpx.Client, question: dict[str, Any]) -> SurfaceResponse:
    answer = http.post("/v1/messages", json=question, headers={"X-Request-Id": "same"})
    if answer.status_code != 200:
        return SurfaceResponse(error=(CODES[answer.status_code], answer.json()["error"]["message"]))
    message = _from_events(answer.text) if question["stream"] else answer.json()
    counted = http.post("/v1/messages/count_tokens", json=_prompt(question)).json()["input_tokens"]
    usage = message["usage"]
    cached = usage["cache_read_input_tokens"]
    assert counted == usage["input_tokens"] + cached
    assert answer.headers["request-id"] == "same"
    result = SurfaceResponse(usage=(counted, usage["output_tokens"], cached), request_id=answer.headers["x-request-id"])
    result.cache = answer.headers["x-expertmesh-cache"]
    blocks = message["content"]

    def joined(type_: str) -> str:
        return "".join(block[type_] for block in blocks if block["type"] == type_)

    calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    finish = FINISHES[message["stop_reason"]]
    texts = {"text": joined("text"), "reasoning": joined("thinking"), "calls": calls, "finish": finish}
    result.choices = [texts | {"logprobs": []}]
    return result


def _prompt(question: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `question` that decide the prompt."""
    names = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config")
    return {name: question[name] for name in names if name in question}


def _from_events(text: str) -> dict[str, Any]:
    """Return the whole message of a stream of events."""
    message: dict[str, Any] = {}
    for event in (json.loads(part.partition("data: ")[2]) for part in text.split("\n\n") if part):
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                message["content"].append(event["content_block"] | {"json": ""})
            case "content_block_delta":
                block, delta = message["content"][event["index"]], dict(event["delta"])
                del delta["type"]
                [(key, value)] = delta.items()
                block["json" if key == "partial_json" else key] += value
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
            case "error":
                raise AssertionError(event)
    for block in message["content"]:
        if block["type"] == "tool_use":
            block["input"] = pydantic_core.from_json(block["json"] or "{}", allow_partial=True)
    return message
