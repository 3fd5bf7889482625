"""`ask_responses` asks a question for chat completions through OpenAI's Responses API, streamed and not streamed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx

from services.gateway.errors import ApiError, ApiRefusal
from services.gateway.responses.body import PARAM_NAMES
from tests.services.gateway.surfaces import CODES, SurfaceResponse

SAME = {  # fields that are equal in both APIs
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "stop_token_ids", "ignore_eos"),
    *("min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "priority", "timeout", "cache_salt"),
    *("enable_thinking", "thinking_token_budget", "chat_template_kwargs", "parallel_tool_calls"),
    *("stop", "include_stop_str_in_output", "skip_special_tokens", "structured_outputs"),
}
CONVERTED = {"messages", "max_tokens", "tools", "tool_choice", "response_format", "reasoning_effort"}
LOGPROBS = {"logprobs", "top_logprobs"}
NAMES = PARAM_NAMES | {r"response_format(\.json_schema)?": "text.format"}


def ask_responses(http: httpx.Client, body: dict[str, Any]) -> dict[str, SurfaceResponse]:
    """Return the responses to the body of a chat, or no responses if the Responses API cannot express the body."""
    question = to_question(body)
    if question is None:
        return {}
    return {f"responses, stream={stream}": _ask(http, question | {"stream": stream}) for stream in (False, True)}


def as_response(result: SurfaceResponse) -> SurfaceResponse:
    """Return the response of another surface with the names of parameters that the Responses API has.

    The Responses API shows no logprobs where there is no message.
    """
    if result.error is not None:
        code, sentence = result.error
        return replace(result, error=(code, ApiError(ApiRefusal.INVALID, sentence).renamed(NAMES).message))
    return result


def to_question(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the body of the same question for the Responses API, or None if the API cannot express the question."""
    if "messages" not in body or not body.keys() <= SAME | CONVERTED | LOGPROBS:
        return None
    if "parallel_tool_calls" in body and "tools" not in body:
        return None  # the Responses API ignores the field there, because its clients send it always
    items = [_items(message) for message in body["messages"]]
    if None in items or body.get("logprobs", True) is not True:
        return None
    question = {name: value for name, value in body.items() if name in SAME}
    question["input"] = [item for parts in items if parts for item in parts]
    if "max_tokens" in body:
        question["max_output_tokens"] = body["max_tokens"]
    if "logprobs" in body:
        question["include"] = ["message.output_text.logprobs"]
        question["top_logprobs"] = body.get("top_logprobs", 0)
    if "response_format" in body:
        form = dict(body["response_format"])
        question["text"] = {"format": form | form.pop("json_schema", {})}
    if "reasoning_effort" in body:
        question["reasoning"] = {"effort": body["reasoning_effort"]}
    if "tools" in body:
        question["tools"] = [{"type": "function", **tool["function"]} for tool in body["tools"]]
    if "tool_choice" in body:
        choice = body["tool_choice"]
        question["tool_choice"] = _choice(choice) if isinstance(choice, dict) else choice
    return question


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    if choice["type"] == "function":
        return {"type": "function", **choice["function"]}
    allowed = choice["allowed_tools"]
    tools = [{"type": "function", **tool["function"]} for tool in allowed["tools"]]
    return {"type": "allowed_tools", "mode": allowed["mode"], "tools": tools}


def _items(message: dict[str, Any]) -> list[dict[str, Any]] | None:
    if message.keys() - {"role", "content", "reasoning_content", "tool_calls", "tool_call_id"}:
        return None
    if message["role"] == "tool":
        output = {"type": "function_call_output", "output": message["content"]}
        return [output | {"call_id": message["tool_call_id"]}] if "tool_call_id" in message else None
    items: list[dict[str, Any]] = []
    if "reasoning_content" in message:
        text = {"type": "reasoning_text", "text": message["reasoning_content"]}
        items.append({"type": "reasoning", "summary": [], "content": [text]})
    if message.get("content"):
        items.append({"role": message["role"], "content": message["content"]})
    for call in message.get("tool_calls", []):
        items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    return items


def _ask(http: httpx.Client, question: dict[str, Any]) -> SurfaceResponse:
    answer = http.post("/v1/responses", json=question, headers={"X-Request-Id": "same"})
    if answer.status_code != 200:
        return SurfaceResponse(error=(CODES[answer.status_code], answer.json()["error"]["message"]))
    response = _from_events(answer.text) if question["stream"] else answer.json()
    stored = http.get(f"/v1/responses/{response['id']}").json()
    assert stored == response
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    counts = (usage["input_tokens"], usage["output_tokens"], usage["input_tokens_details"]["cached_tokens"])
    result = SurfaceResponse(usage=counts, request_id=answer.headers["x-request-id"])
    result.cache = answer.headers["x-expertmesh-cache"]
    output = response["output"]
    messages = [part for item in output if item["type"] == "message" for part in item["content"]]
    reasoning = [part for item in output if item["type"] == "reasoning" for part in item["content"]]
    calls = [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
    finish = "length" if response["status"] == "incomplete" else "tool_calls" if calls else "stop"
    one = {"text": _joined(messages), "reasoning": _joined(reasoning), "calls": dict(enumerate(calls))}
    scores = [_score(token) for part in messages for token in part["logprobs"]]
    result.choices = [one | {"finish": finish, "logprobs": scores}]
    return result


def _joined(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def _score(token: dict[str, Any]) -> tuple[bytes, float, list[tuple[bytes, float]]]:
    tops = [(bytes(top["bytes"]), top["logprob"]) for top in token["top_logprobs"]]
    return bytes(token["bytes"]), token["logprob"], tops


def _from_events(text: str) -> dict[str, Any]:
    """Return the response that ends a stream, and check that the pieces in the stream make its output."""
    pieces: dict[int, str] = {}
    events = [json.loads(part.partition("data: ")[2]) for part in text.split("\n\n") if part]
    for event in events:
        if event["type"].endswith(".delta"):
            pieces[event["output_index"]] = pieces.get(event["output_index"], "") + event["delta"]
    response: dict[str, Any] = events[-1]["response"]
    for index, item in enumerate(response["output"]):
        whole = item["arguments"] if item["type"] == "function_call" else _joined(item["content"])
        assert pieces.get(index, "") == whole
    return response
