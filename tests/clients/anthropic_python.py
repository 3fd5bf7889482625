"""These checks use the `anthropic` client: messages, streams, tools, thinking, structured output, counts and errors."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import anthropic
from checks import KEY, MODEL, QUESTION, TOO_LONG, WEATHER_SCHEMA, check_weather, error_of, run_checks
from pydantic import BaseModel

ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 20,
    "messages": [{"role": "user", "content": QUESTION}],
    "extra_body": {"temperature": 0},  # the client has no such parameter any more, but the API has it
}
TOOL = {"name": "get_weather", "description": "Tell the weather.", "input_schema": WEATHER_SCHEMA}
FORCED = {"type": "any", "disable_parallel_tool_use": True}


class Weather(BaseModel):
    """A `Weather` is the structured answer of the checks."""

    city: Literal["Paris", "Rome"]
    is_warm: bool


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)


def message_and_stream(url: str) -> None:
    for system in ("Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]):
        whole = client(url).messages.create(**ASK, system=system)
        with client(url).messages.stream(**ASK, system=system) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert [block.type for block in final.content] == [block.type for block in whole.content] == ["text"]
        assert text == final.content[0].text == whole.content[0].text
        assert final.usage.output_tokens == whole.usage.output_tokens


def tools_and_results_sent_back(url: str) -> None:
    ask: dict[str, Any] = {**ASK, "max_tokens": 200, "tools": [TOOL], "tool_choice": FORCED}
    with client(url).messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    whole = client(url).messages.create(**ask)
    for answer in (whole, streamed):
        call = next(block for block in answer.content if block.type == "tool_use")
        assert isinstance(call.input, dict)
        check_weather(call.input)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "20 degrees"}]}
        for past in (answer.content, [block.model_dump() for block in answer.content]):
            turns = [{"role": "assistant", "content": past}, {"role": "user", "content": [result]}]
            client(url).messages.create(**{**ASK, "messages": [*ASK["messages"], *turns], "tools": [TOOL]})


def thinking_sent_back(url: str) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    ask: dict[str, Any] = {**ASK, "thinking": thinking, "max_tokens": 1100, "stop_sequences": ["e"]}
    with client(url).messages.stream(**ask) as stream:
        answer = stream.get_final_message()
    assert answer.content[0].type == "thinking"
    turns = [{"role": "assistant", "content": answer.content}, *ASK["messages"]]
    client(url).messages.create(**{**ASK, "messages": [*ASK["messages"], *turns]})


def structured_output(url: str) -> None:
    answer = client(url).messages.parse(**{**ASK, "max_tokens": 200}, output_format=Weather)
    assert isinstance(answer.parsed_output, Weather)


def count_tokens(url: str) -> None:
    count = client(url).messages.count_tokens(model=MODEL, messages=ASK["messages"], tools=[TOOL])
    answer = client(url).messages.create(**ASK, tools=[TOOL])
    assert count.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def errors(url: str) -> None:
    for kind, changes in (
        (anthropic.NotFoundError, {"model": "another"}),
        (anthropic.BadRequestError, {"messages": [{"role": "user", "content": TOO_LONG}]}),
        (anthropic.BadRequestError, {"extra_body": {"temperature": -1}}),
    ):
        error = error_of(kind, partial(client(url).messages.create, **{**ASK, **changes}))
        assert isinstance(error.body, dict)
        assert error.body["type"] == "error"


if __name__ == "__main__":
    run_checks(
        message_and_stream,
        tools_and_results_sent_back,
        thinking_sent_back,
        structured_output,
        count_tokens,
        errors,
    )
