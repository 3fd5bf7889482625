"""These checks use `ChatOpenAI` of langchain-openai: chats, streams, tools, structured output and both of its APIs."""

from __future__ import annotations

from typing import Any, Literal

from checks import KEY, MODEL, QUESTION, TOO_LONG, WEATHER_TOOL, check_weather, error_of, run_checks
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """A `Weather` is the structured answer of the checks."""

    city: Literal["Paris", "Rome"]
    is_warm: bool


def model(url: str, max_tokens: int = 20, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=f"{url}/v1", api_key=KEY, temperature=0, max_tokens=max_tokens, max_retries=0, **options
    )


def invoke_and_stream(url: str) -> None:
    answer = model(url).invoke(QUESTION)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 20
    assert "".join(str(chunk.content) for chunk in model(url).stream(QUESTION)) == answer.content


def tools_and_results_sent_back(url: str) -> None:
    bound = model(url, 200).bind_tools([WEATHER_TOOL], tool_choice="required", parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)
    check_weather(answer.tool_calls[0]["args"])
    result = ToolMessage("20 degrees", tool_call_id=answer.tool_calls[0]["id"])
    model(url).bind_tools([WEATHER_TOOL]).invoke([HumanMessage(QUESTION), answer, result])


def streamed_tools_sent_back(url: str) -> None:
    bound = model(url, 200).bind_tools([WEATHER_TOOL], tool_choice="required", parallel_tool_calls=False)
    first, *rest = bound.stream(QUESTION)
    answer = first
    for chunk in rest:
        answer += chunk
    check_weather(answer.tool_calls[0]["args"])
    model(url).invoke([HumanMessage(QUESTION), answer, ToolMessage("20", tool_call_id=answer.tool_calls[0]["id"])])


def structured_output(url: str) -> None:
    for method in ("json_schema", "function_calling"):
        answer = model(url, 200).with_structured_output(Weather, method=method).invoke(QUESTION)
        assert isinstance(answer, Weather), (method, answer)


def responses_api(url: str) -> None:
    bound = model(url, 200, use_responses_api=True).bind_tools(
        [WEATHER_TOOL], tool_choice="required", parallel_tool_calls=False
    )
    answer = bound.invoke(QUESTION)
    check_weather(answer.tool_calls[0]["args"])
    result = ToolMessage("20 degrees", tool_call_id=answer.tool_calls[0]["id"])
    model(url, use_responses_api=True).invoke([HumanMessage(QUESTION), answer, result])


def context_overflow(url: str) -> None:
    error_of(ContextOverflowError, lambda: model(url).invoke(TOO_LONG))


if __name__ == "__main__":
    run_checks(
        invoke_and_stream,
        tools_and_results_sent_back,
        streamed_tools_sent_back,
        structured_output,
        responses_api,
        context_overflow,
    )
