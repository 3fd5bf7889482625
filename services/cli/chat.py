"""The command `expertmesh chat` talks to a running server from the terminal."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from services.cli.terminal import DEFAULT_URL, Url, fetch, plain_errors


def chat(
    message: Annotated[str, typer.Argument(help="One message to send. Default: a conversation on the terminal.")] = "",
    url: Url = DEFAULT_URL,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Randomness of the answer; 0 always takes the likeliest token.")
    ] = 0.7,
) -> None:
    """Talk to a running server."""
    with plain_errors():
        model = fetch(url, "/v1/models")["data"][0]["id"]
        messages: list[dict[str, str]] = []
        while text := message or _ask():
            messages.append({"role": "user", "content": text})
            answer = _stream_answer(
                url, {"model": model, "max_tokens": max_tokens, "temperature": temperature}, messages
            )
            messages.append({"role": "assistant", "content": answer})
            if message:
                return


def _ask() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _stream_answer(url: str, options: dict[str, Any], messages: list[dict[str, str]]) -> str:
    from openai import APIError, OpenAI

    client = OpenAI(base_url=url.rstrip("/") + "/v1", api_key="none", max_retries=0)
    pieces = []
    try:
        stream: Any = client.chat.completions.create(messages=messages, stream=True, **options)  # type: ignore[arg-type]
        for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "" if chunk.choices else "")
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
    except APIError as error:
        raise ValueError(error.message) from None
    print()
    return "".join(pieces)
