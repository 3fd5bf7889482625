"""These checks use openai-agents with the Responses API and with chat completions: tools, hand-over and streams."""

from __future__ import annotations

from typing import Literal

import agents
import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents.models.interface import Model
from checks import KEY, MODEL, QUESTION, run_checks
from pydantic import BaseModel

agents.set_tracing_disabled(True)
SHAPED = ModelSettings(max_tokens=200, temperature=0)
FORCED = ModelSettings(max_tokens=200, temperature=0, tool_choice="required", parallel_tool_calls=False)


class Weather(BaseModel):
    """A `Weather` is the structured answer of the checks."""

    city: Literal["Paris", "Rome"]
    is_warm: bool


@function_tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather."""
    return f"20 degrees in {city}"


def models(url: str) -> tuple[Model, Model]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    return OpenAIResponsesModel(MODEL, client), OpenAIChatCompletionsModel(MODEL, client)


def answerer(model: Model) -> Agent:
    """Return an agent with a short structured answer; the client refuses answers that are cut off at max_tokens."""
    return Agent(name="Roman", instructions="Be brief.", model=model, model_settings=SHAPED, output_type=Weather)


def caller(model: Model) -> Agent:
    """Return an agent that must call its tool, and whose answer is the result of the tool."""
    return Agent(
        name="Guide",
        tools=[get_weather],
        model=model,
        model_settings=FORCED,
        tool_use_behavior="stop_on_first_tool",
    )


async def structured_output_and_next_turn(url: str) -> None:
    for model in models(url):
        result = await Runner.run(answerer(model), QUESTION)
        assert isinstance(result.final_output, Weather)
        await Runner.run(answerer(model), [*result.to_input_list(), {"role": "user", "content": "And in Rome?"}])


async def forced_tool_and_its_result(url: str) -> None:
    for model in models(url):
        result = await Runner.run(caller(model), QUESTION)
        assert result.final_output in ("20 degrees in Paris", "20 degrees in Rome"), result.final_output
        await Runner.run(answerer(model), result.to_input_list())


async def streamed_tool_and_its_result(url: str) -> None:
    for model in models(url):
        result = Runner.run_streamed(caller(model), QUESTION)
        names = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
        assert names == ["tool_called", "tool_output"], names
        await Runner.run(answerer(model), result.to_input_list())


async def handoff(url: str) -> None:
    for model in models(url):
        first = Agent(name="Guide", handoffs=[answerer(model)], model=model, model_settings=FORCED)
        assert (await Runner.run(first, QUESTION)).last_agent.name == "Roman"


if __name__ == "__main__":
    run_checks(structured_output_and_next_turn, forced_tool_and_its_result, streamed_tool_and_its_result, handoff)
