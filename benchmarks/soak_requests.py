"""The soak's requests, drawn at random: each kind with the status that it must get."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.load import FIRST_ORDINARY_ID
from model.demo.corpus import read_corpus

VOCAB_SIZE = 2048  # the demo's; larger models know these ids too
PROMPT_LENS, OUTPUT_LENS = (1, 8, 40, 150, 500, 1200), (1, 4, 16, 48, 96)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD = 400


@dataclass(frozen=True)
class SoakRequest:
    """`cancel_after`: the client goes away after that many pieces of the stream; 0: it stays."""

    kind: str
    path: str
    content: bytes
    expected: int = 200
    cancel_after: int = 0
    method: str = "POST"


@cache
def _texts() -> list[str]:
    return [text for text in read_corpus()[1] if len(text) > 4000]


def _text(draw: random.Random, num_characters: int) -> str:
    text = draw.choice(_texts())
    start = draw.randrange(len(text) - num_characters)
    return text[start : start + num_characters]


def _prompt(draw: random.Random) -> dict[str, Any]:
    """Ids that nobody sent before, or a beginning that others share."""
    length = draw.choice(PROMPT_LENS)
    if draw.random() < 0.5:
        prompt: Any = [draw.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(length)]
    else:
        prompt = draw.choice(_texts())[: 2 * length]
    return {"prompt": prompt, "max_tokens": draw.choice(OUTPUT_LENS)}


def _messages(draw: random.Random) -> dict[str, Any]:
    said = [{"role": "system", "content": "You complete Python."}] if draw.random() < 0.5 else []
    for _ in range(draw.randrange(3)):
        said += [{"role": "user", "content": _text(draw, 80)}, {"role": "assistant", "content": _text(draw, 60)}]
    return {"messages": [*said, {"role": "user", "content": _text(draw, 120)}], "max_tokens": draw.choice(OUTPUT_LENS)}


def _sampling(draw: random.Random) -> dict[str, Any]:
    """Each parameter is there half of the time."""
    values = {
        "temperature": draw.choice((0.0, 0.5, 1.0, 1.7)),
        "top_p": draw.choice((0.1, 0.9, 1.0)),
        "top_k": draw.choice((1, 20, 500)),
        "min_p": draw.choice((0.0, 0.05)),
        "presence_penalty": draw.choice((-1.0, 0.5)),
        "frequency_penalty": draw.choice((-0.5, 1.0)),
        "repetition_penalty": draw.choice((0.9, 1.3)),
        "seed": draw.randrange(2**31),
        "logit_bias": {str(draw.randrange(VOCAB_SIZE)): draw.choice((-100, 5))},
        "ignore_eos": draw.random() < 0.5,
        "stop": draw.choice(("\n\n", "def ", "return")),
        "n": draw.choice((1, 2, 3)),
    }
    return {name: value for name, value in values.items() if draw.random() < 0.5}


def _stream(draw: random.Random) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if draw.random() < 0.6 else {}


def _body(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def completion(draw: random.Random) -> SoakRequest:
    body = _prompt(draw) | _sampling(draw) | _stream(draw)
    return SoakRequest("completion", COMPLETIONS, _body(body))


def chat(draw: random.Random) -> SoakRequest:
    return SoakRequest("chat", CHAT, _body(_messages(draw) | _sampling(draw) | _stream(draw)))


def logprobs(draw: random.Random) -> SoakRequest:
    if draw.random() < 0.5:
        body = _messages(draw) | {"logprobs": True, "top_logprobs": draw.randrange(6)} | _stream(draw)
        return SoakRequest("logprobs", CHAT, _body(body))
    return SoakRequest("logprobs", COMPLETIONS, _body(_prompt(draw) | {"logprobs": draw.randrange(6)} | _stream(draw)))


def grammar(draw: random.Random) -> SoakRequest:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    named = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    body = _messages(draw) | {"response_format": draw.choice(({"type": "json_object"}, named)), "temperature": 1.0}
    return SoakRequest("grammar", CHAT, _body(body | _stream(draw)))


def cancel(draw: random.Random) -> SoakRequest:
    path, body = (COMPLETIONS, _prompt(draw)) if draw.random() < 0.5 else (CHAT, _messages(draw))
    long = {"max_tokens": 400, "ignore_eos": True, "stream": True, "n": draw.choice((1, 1, 2))}
    return SoakRequest("cancel", path, _body(body | long), cancel_after=draw.choice((1, 3, 20)))


def bad(draw: random.Random) -> SoakRequest:
    prompt = _prompt(draw)
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
    name, content = draw.choice(bodies)
    return SoakRequest(f"bad: {name}", COMPLETIONS, content, BAD)


def lost(draw: random.Random) -> SoakRequest:
    unknown_model = SoakRequest("bad: model", COMPLETIONS, _body(_prompt(draw) | {"model": "another"}), 404)
    unknown_path = SoakRequest("bad: path", "/v1/nothing", b"{}", 404)
    wrong_method = SoakRequest("bad: method", COMPLETIONS, b"", 405, method="GET")
    return draw.choice((unknown_model, unknown_path, wrong_method))


WEIGHTS: dict[Callable[[random.Random], SoakRequest], int] = {
    completion: 30,
    chat: 20,
    logprobs: 8,
    grammar: 6,
    cancel: 16,
    bad: 14,
    lost: 6,
}


def draw_ask(draw: random.Random) -> SoakRequest:
    (make,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
    return make(draw)
