"""These checks use litellm as a library, with the provider for OpenAI-compatible servers and the one for vLLM."""

from __future__ import annotations

from typing import Any

import litellm
from checks import KEY, MODEL, QUESTION, run_checks
from litellm_questions import (
    check_chat_and_stream,
    check_context_error,
    check_structured_output,
    check_thinking_sent_back,
    check_tools_sent_back,
)


def model(url: str, provider: str = "openai") -> dict[str, Any]:
    return {"model": f"{provider}/{MODEL}", "api_base": f"{url}/v1", "api_key": KEY}


def chat_and_stream(url: str) -> None:
    check_chat_and_stream(model(url))


def tools_and_results_sent_back(url: str) -> None:
    check_tools_sent_back(model(url))


def structured_output(url: str) -> None:
    check_structured_output(model(url, "hosted_vllm"))


def thinking_sent_back(url: str) -> None:
    check_thinking_sent_back(model(url, "hosted_vllm"))


def context_error(url: str) -> None:
    check_context_error(model(url))
    check_context_error(model(url, "hosted_vllm"))


def provider_hosted_vllm(url: str) -> None:
    check_chat_and_stream(model(url, "hosted_vllm"))
    check_tools_sent_back(model(url, "hosted_vllm"))


def text_completion(url: str) -> None:
    target = {**model(url), "model": f"text-completion-openai/{MODEL}"}
    answer = litellm.text_completion(**target, prompt=QUESTION, max_tokens=4, temperature=0)
    assert answer.choices[0].finish_reason in ("length", "stop")


def responses(url: str) -> None:
    answer = litellm.responses(**model(url), input=QUESTION, max_output_tokens=20)
    assert answer.status in ("completed", "incomplete")


if __name__ == "__main__":
    run_checks(
        chat_and_stream,
        tools_and_results_sent_back,
        structured_output,
        thinking_sent_back,
        context_error,
        provider_hosted_vllm,
        text_completion,
        responses,
    )
