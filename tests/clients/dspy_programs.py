"""These checks use programs of dspy with its adapters for chats and for JSON, and a stream."""

from __future__ import annotations

from typing import Literal

import dspy
from checks import KEY, MODEL, QUESTION, run_checks


class SchemaLM(dspy.LM):
    """A `SchemaLM` says that its model takes JSON schemas; dspy believes this only of the models in its own list."""

    supports_response_schema = True
    supported_params = frozenset({"response_format"})


class Weather(dspy.Signature):
    """Say how the weather is."""

    question: str = dspy.InputField()
    city: Literal["Paris", "Rome"] = dspy.OutputField()
    is_warm: bool = dspy.OutputField()


def lm(url: str, max_tokens: int) -> SchemaLM:
    options = {"temperature": 0, "max_tokens": max_tokens, "num_retries": 0, "cache": False}
    return SchemaLM(f"openai/{MODEL}", api_base=f"{url}/v1", api_key=KEY, **options)


def call(url: str) -> None:
    [answer] = lm(url, 10)(QUESTION)
    assert isinstance(answer, str | dict)


def several_answers(url: str) -> None:
    assert len(lm(url, 10)(QUESTION, n=3, temperature=1.0)) == 3


def predict_in_json(url: str) -> None:
    with dspy.context(lm=lm(url, 300), adapter=dspy.JSONAdapter()):
        answer = dspy.Predict(Weather)(question=QUESTION)
    assert answer.city in ("Paris", "Rome")
    assert isinstance(answer.is_warm, bool)


def predict_as_chat(url: str) -> None:
    """Force the adapter's own form with a regular expression, because the demo model does not follow instructions."""
    form = r"\[\[ ## city ## \]\]\n(Paris|Rome)\n\n\[\[ ## is_warm ## \]\]\n(True|False)\n\n\[\[ ## completed ## \]\]"
    forced = lm(url, 300).copy(extra_body={"structured_outputs": {"regex": form}})
    with dspy.context(lm=forced, adapter=dspy.ChatAdapter()):
        answer = dspy.Predict(Weather)(question=QUESTION)
    assert answer.city in ("Paris", "Rome")
    assert isinstance(answer.is_warm, bool)


if __name__ == "__main__":
    run_checks(call, several_answers, predict_in_json, predict_as_chat)
