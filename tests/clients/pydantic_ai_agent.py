"""These checks use agents of pydantic-ai over both of OpenAI's APIs: text, streams, tools and structured output."""

from __future__ import annotations

from typing import Literal

from checks import KEY, MODEL, QUESTION, run_checks
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

SETTINGS = ModelSettings(max_tokens=200, temperature=0, parallel_tool_calls=False)


class Weather(BaseModel):
    """A `Weather` is the structured answer of the checks."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=7)


def models(url: str) -> tuple[Model, Model]:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=KEY)
    return OpenAIChatModel(MODEL, provider=provider), OpenAIResponsesModel(MODEL, provider=provider)


async def text_and_stream(url: str) -> None:
    for model in models(url):
        agent = Agent(model, model_settings=ModelSettings(max_tokens=20, temperature=0))
        answer = await agent.run(QUESTION)
        async with agent.run_stream(QUESTION) as stream:
            assert await stream.get_output() == answer.output
        await agent.run("And in Rome?", message_history=answer.all_messages())


async def output_of_a_tool(url: str) -> None:
    for model in models(url):
        answer = await Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS).run(QUESTION)
        assert isinstance(answer.output, Weather)
        await Agent(model, model_settings=ModelSettings(max_tokens=20)).run(
            "Thanks.", message_history=answer.all_messages()
        )


async def output_of_a_schema(url: str) -> None:
    for model in models(url):
        answer = await Agent(model, output_type=NativeOutput(Weather), model_settings=SETTINGS).run(QUESTION)
        assert isinstance(answer.output, Weather)


async def streamed_output(url: str) -> None:
    for model in models(url):
        agent = Agent(model, output_type=ToolOutput(Weather), model_settings=SETTINGS)
        async with agent.run_stream(QUESTION) as stream:
            assert isinstance(await stream.get_output(), Weather)


if __name__ == "__main__":
    run_checks(text_and_stream, output_of_a_tool, output_of_a_schema, streamed_output)
