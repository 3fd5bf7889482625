"""`draw_request` draws random requests for the soak test; each request has an expected HTTP status."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.load import FIRST_ORDINARY_ID
from model.demo.corpus import read_corpus

VOCAB_SIZE = 2048  # size of the demo's vocabulary; larger models also have these token ids
PROMPT_LENS, OUTPUT_LENS = (1, 8, 40, 150, 500, 1200), (1, 4, 16, 48, 96)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD_REQUEST = 400


@dataclass(frozen=True)
class SoakRequest:
    """A `SoakRequest` is one HTTP request with its expected status.

    The client disconnects after `cancel_after` pieces of the stream. If `cancel_after` is 0, the client reads the whole
    answer.
    """

    kind: str
    path: str
    content: bytes
    expected: int = 200
    cancel_after: int = 0
    method: str = "POST"


@cache
def _texts() -> list[str]:
    return [text for text in read_corpus()[1] if len(text) > 4000]


def _text(rng: random.Random, num_characters: int) -> str:
    text = rng.choice(_texts())
    start = rng.randrange(len(text) - num_characters)
    return text[start : start + num_characters]


def _prompt(rng: random.Random) -> dict[str, Any]:
    """Draw a prompt: random token ids, or the beginning of a text that is also the beginning of other prompts."""
    length = rng.choice(PROMPT_LENS)
    if rng.random() < 0.5:
        prompt: Any = [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(length)]
    else:
        prompt = rng.choice(_texts())[: 2 * length]
    return {"prompt": prompt, "max_tokens": rng.choice(OUTPUT_LENS)}


def _messages(rng: random.Random) -> dict[str, Any]:
    history = [{"role": "system", "content": "You complete Python."}] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(3)):
        history += [{"role": "user", "content": _text(rng, 80)}, {"role": "assistant", "content": _text(rng, 60)}]
    return {"messages": [*history, {"role": "user", "content": _text(rng, 120)}], "max_tokens": rng.choice(OUTPUT_LENS)}


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Draw sampling parameters. Each parameter is present with a probability of one half."""
    values = {
        "temperature": rng.choice((0.0, 0.5, 1.0, 1.7)),
        "top_p": rng.choice((0.1, 0.9, 1.0)),
        "top_k": rng.choice((1, 20, 500)),
        "min_p": rng.choice((0.0, 0.05)),
        "presence_penalty": rng.choice((-1.0, 0.5)),
        "frequency_penalty": rng.choice((-0.5, 1.0)),
        "repetition_penalty": rng.choice((0.9, 1.3)),
        "seed": rng.randrange(2**31),
        "logit_bias": {str(rng.randrange(VOCAB_SIZE)): rng.choice((-100, 5))},
        "ignore_eos": rng.random() < 0.5,
        "stop": rng.choice(("\n\n", "def ", "return")),
        "n": rng.choice((1, 2, 3)),
    }
    return {name: value for name, value in values.items() if rng.random() < 0.5}


def _stream(rng: random.Random) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if rng.random() < 0.6 else {}


def _body(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def completion(rng: random.Random) -> SoakRequest:
    body = _prompt(rng) | _sampling(rng) | _stream(rng)
    return SoakRequest("completion", COMPLETIONS, _body(body))


def chat(rng: random.Random) -> SoakRequest:
    return SoakRequest("chat", CHAT, _body(_messages(rng) | _sampling(rng) | _stream(rng)))


def logprobs(rng: random.Random) -> SoakRequest:
    if rng.random() < 0.5:
        body = _messages(rng) | {"logprobs": True, "top_logprobs": rng.randrange(6)} | _stream(rng)
        return SoakRequest("logprobs", CHAT, _body(body))
    return SoakRequest("logprobs", COMPLETIONS, _body(_prompt(rng) | {"logprobs": rng.randrange(6)} | _stream(rng)))


def grammar(rng: random.Random) -> SoakRequest:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    named = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = _messages(rng) | {"response_format": rng.choice(({"type": "json_object"}, named)), "temperature": 1.0}
    return SoakRequest("grammar", CHAT, _body(body | _stream(rng)))


def cancel(rng: random.Random) -> SoakRequest:
    path, body = (COMPLETIONS, _prompt(rng)) if rng.random() < 0.5 else (CHAT, _messages(rng))
    long = {"max_tokens": 400, "ignore_eos": True, "stream": True, "n": rng.choice((1, 1, 2))}
    return SoakRequest("cancel", path, _body(body | long), cancel_after=rng.choice((1, 3, 20)))


def bad(rng: random.Random) -> SoakRequest:
    prompt = _prompt(rng)
    bodies: list[tuple[str, bytes]] = [
        ("unknown field", _body(prompt | {"temprature": 1})),
        ("temperature", _body(prompt | {"temperature": -1})),
        ("too long", _body(prompt | {"max_tokens": 10**9})),
        ("unknown id", _body({"prompt": [10**6], "max_tokens": 4})),
        ("wrong type", _body(prompt | {"n": "many"})),
        ("no prompt", _body({"max_tokens": 4})),
        ("no JSON", b'{"prompt": "def'),
        ("empty", b""),
    ]
    name, content = rng.choice(bodies)
    return SoakRequest(f"bad: {name}", COMPLETIONS, content, BAD_REQUEST)


def not_found(rng: random.Random) -> SoakRequest:
    unknown_model = SoakRequest("bad: model", COMPLETIONS, _body(_prompt(rng) | {"model": "another"}), 404)
    unknown_path = SoakRequest("bad: path", "/v1/nothing", b"{}", 404)
    wrong_method = SoakRequest("bad: method", COMPLETIONS, b"", 405, method="GET")
    return rng.choice((unknown_model, unknown_path, wrong_method))


WEIGHTS: dict[Callable[[random.Random], SoakRequest], int] = {
    completion: 30,
    chat: 20,
    logprobs: 8,
    grammar: 6,
    cancel: 16,
    bad: 14,
    not_found: 6,
}


def draw_request(rng: random.Random) -> SoakRequest:
    (make,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
    return make(rng)
