"""These checks use instructor in its modes for tools, for JSON schemas and for JSON, whole and streamed."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from checks import KEY, MODEL, QUESTION, run_checks
from pydantic import BaseModel, ConfigDict, Field

ASK: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 200,
    "max_retries": 0,
}


class Weather(BaseModel):
    """A `Weather` is the structured answer of the checks."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=7)


def client(url: str, mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0), mode=mode)


def mode_tools(url: str) -> None:
    answer = client(url, instructor.Mode.TOOLS).create(response_model=Weather, **ASK)
    assert isinstance(answer, Weather)


def mode_tools_strict(url: str) -> None:
    answer = client(url, instructor.Mode.TOOLS_STRICT).create(response_model=Weather, **ASK)
    assert isinstance(answer, Weather)


def mode_json_schema(url: str) -> None:
    answer = client(url, instructor.Mode.JSON_SCHEMA).create(response_model=Weather, **ASK)
    assert isinstance(answer, Weather)


def partial_answers(url: str) -> None:
    partials = list(client(url, instructor.Mode.TOOLS).create_partial(response_model=Weather, **ASK))
    Weather.model_validate(partials[-1].model_dump())


if __name__ == "__main__":
    run_checks(mode_tools, mode_tools_strict, mode_json_schema, partial_answers)
