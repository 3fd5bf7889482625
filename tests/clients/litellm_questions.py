"""These questions are asked through litellm, both as a library and through its proxy."""

from __future__ import annotations

from typing import Any, Literal

import litellm
from checks import QUESTION, TOO_LONG, WEATHER_TOOL, check_weather, error_of
from pydantic import BaseModel

litellm.drop_params = False
litellm.num_retries = 0


class Weather(BaseModel):
    """A `Weather` is the structured answer of the checks."""

    city: Literal["Paris", "Rome"]
    is_warm: bool


def ask(model: dict[str, Any], max_tokens: int = 20, **options: Any) -> Any:
    """Ask the shared question; `model` has litellm's name of the model and the address of its server."""
    options.setdefault("messages", [{"role": "user", "content": QUESTION}])
    return litellm.completion(**model, max_tokens=max_tokens, temperature=0, **options)


def check_chat_and_stream(model: dict[str, Any]) -> None:
    text = ask(model).choices[0].message.content
    chunks = list(ask(model, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def check_tools_sent_back(model: dict[str, Any]) -> None:
    tools = {"tools": [WEATHER_TOOL]}
    answer = ask(model, 200, **tools, tool_choice="required", parallel_tool_calls=False)
    message = answer.choices[0].message
    check_weather(message.tool_calls[0].function.arguments)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "20 degrees"}
    question = {"role": "user", "content": QUESTION}
    for past in (message, message.model_dump()):
        ask(model, messages=[question, past, result], **tools)


def check_structured_output(model: dict[str, Any]) -> None:
    answer = ask(model, 200, response_format=Weather)
    Weather.model_validate_json(answer.choices[0].message.content)


def check_thinking_sent_back(model: dict[str, Any]) -> None:
    message = ask(model, 60, reasoning_effort="low").choices[0].message
    assert message.reasoning_content
    question = {"role": "user", "content": QUESTION}
    ask(model, messages=[question, message.model_dump(), question])


def check_context_error(model: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": TOO_LONG}]
    error_of(litellm.ContextWindowExceededError, lambda: ask(model, messages=messages))
