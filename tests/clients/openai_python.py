"""These checks use the `openai` client of Python: chats, completions, responses, tools, structured output, errors."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Literal

import openai
from checks import KEY, MODEL, QUESTION, TOO_LONG, WEATHER_SCHEMA, WEATHER_TOOL, check_weather, error_of, run_checks
from pydantic import BaseModel

ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 20,
}
CALL: dict[str, Any] = {
    **ASK,
    "tools": [WEATHER_TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 200,
}
ASK_RESPONSES: dict[str, Any] = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 20}


class Weather(BaseModel):
    """A `Weather` is the structured answer of the checks."""

    city: Literal["Paris", "Rome"]
    is_warm: bool


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def models(url: str) -> None:
    ids = [model.id for model in client(url).models.list()]
    assert ids == [MODEL], ids
    assert client(url).models.retrieve(MODEL).id == MODEL


def chat(url: str) -> None:
    answer = client(url).chat.completions.create(**ASK)
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 20


def chat_stream(url: str) -> None:
    whole = client(url).chat.completions.create(**ASK).choices[0]
    chunks = list(client(url).chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.finish_reason
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices


def tools_and_results_sent_back(url: str) -> None:
    message = client(url).chat.completions.create(**CALL).choices[0].message
    assert message.tool_calls
    check_weather(message.tool_calls[0].function.arguments)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "20 degrees"} for call in message.tool_calls]
    for past in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        answer = client(url).chat.completions.create(
            **{**ASK, "messages": [*ASK["messages"], past, *results], "tools": [WEATHER_TOOL]}
        )
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def truncated_calls_sent_back(url: str) -> None:
    choice = client(url).chat.completions.create(**{**CALL, "parallel_tool_calls": True, "max_tokens": 70}).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": "?"} for call in choice.message.tool_calls]
    client(url).chat.completions.create(**{**ASK, "messages": [*ASK["messages"], choice.message, *results]})


def stream_helper_and_its_message_sent_back(url: str) -> None:
    with client(url).chat.completions.stream(**{**CALL, "tools": [strict_tool()]}) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds, kinds
    assert message.tool_calls
    check_weather(message.tool_calls[0].function.arguments)
    assert message.tool_calls[0].function.parsed_arguments is not None
    results = [{"role": "tool", "tool_call_id": call.id, "content": "20 degrees"} for call in message.tool_calls]
    for past in (message, message.model_dump()):
        client(url).chat.completions.create(**{**ASK, "messages": [*ASK["messages"], past, *results]})


def strict_tool() -> Any:
    function = {"name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}
    return {"type": "function", "function": function}


def parse_and_its_message_sent_back(url: str) -> None:
    message = client(url).chat.completions.parse(**{**ASK, "max_tokens": 200}, response_format=Weather)
    parsed = message.choices[0].message
    assert isinstance(parsed.parsed, Weather)
    for past in (parsed, parsed.model_dump()):
        client(url).chat.completions.create(**{**ASK, "messages": [*ASK["messages"], past, *ASK["messages"]]})


def logprobs(url: str) -> None:
    answer = client(url).chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content
    assert answer.usage is not None
    assert len(scores.content) == answer.usage.completion_tokens
    assert all(score.logprob == score.top_logprobs[0].logprob for score in scores.content)


def reasoning(url: str) -> None:
    answer = client(url).chat.completions.create(**{**ASK, "max_tokens": 60}, reasoning_effort="low")
    extra = answer.choices[0].message.model_extra or {}
    assert extra["reasoning"] == extra["reasoning_content"]
    past = answer.choices[0].message
    client(url).chat.completions.create(**{**ASK, "messages": [*ASK["messages"], past, *ASK["messages"]]})


def errors(url: str) -> None:
    too_long = [{"role": "user", "content": TOO_LONG}]
    for kind, code, changes in (
        (openai.BadRequestError, "context_length_exceeded", {"messages": too_long}),
        (openai.NotFoundError, "model_not_found", {"model": "another"}),
        (openai.BadRequestError, "unknown_parameter", {"extra_body": {"temprature": 1}}),
    ):
        ask = partial(client(url).chat.completions.create, **{**ASK, **changes})
        error = error_of(kind, ask)
        assert error.code == code, f"the code is {error.code}: {error}"


def completions(url: str) -> None:
    answer = client(url).completions.create(
        model=MODEL, prompt=["One two", "Three"], max_tokens=4, logprobs=2, echo=True, temperature=0
    )
    assert len(answer.choices) == 2
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert answer.choices[0].text.startswith("One two")
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert len(scores.tokens) == len(scores.token_logprobs)


async def concurrent_streams(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as asynchronous:

        async def one() -> str:
            stream = await asynchronous.chat.completions.create(**ASK, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        answers = await asyncio.gather(*(one() for _ in range(16)))
    assert len(set(answers)) == 1, answers


def responses(url: str) -> None:
    first = client(url).responses.create(**ASK_RESPONSES)
    assert isinstance(first.output_text, str)
    second = client(url).responses.create(**ASK_RESPONSES, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    events = [event.type for event in client(url).responses.create(**ASK_RESPONSES, stream=True)]
    assert events[0] == "response.created"
    assert events[-1] in ("response.completed", "response.incomplete"), events[-1]


def responses_tools_and_results_sent_back(url: str) -> None:
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    ask: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": [tool], "max_output_tokens": 200}
    answer = client(url).responses.create(**ask, input=items, tool_choice="required", parallel_tool_calls=False)
    calls = [item for item in answer.output if item.type == "function_call"]
    check_weather(calls[0].arguments)
    items += answer.output
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "20 degrees"} for call in calls]
    again = client(url).responses.create(**{**ask, "max_output_tokens": 16}, input=items)
    assert again.status in ("completed", "incomplete")


def responses_parse(url: str) -> None:
    ask = {**ASK_RESPONSES, "max_output_tokens": 200}
    answer = client(url).responses.parse(**ask, text_format=Weather)
    assert isinstance(answer.output_parsed, Weather)
    with client(url).responses.stream(**ask, text_format=Weather) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == answer.output_parsed


if __name__ == "__main__":
    run_checks(
        models,
        chat,
        chat_stream,
        tools_and_results_sent_back,
        truncated_calls_sent_back,
        stream_helper_and_its_message_sent_back,
        parse_and_its_message_sent_back,
        logprobs,
        reasoning,
        errors,
        completions,
        concurrent_streams,
        responses,
        responses_tools_and_results_sent_back,
        responses_parse,
    )
