"""The test sends bodies with random mistakes; the gateway must answer each body or refuse it with a full sentence."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.services.gateway.echo import EchoSource
from tests.services.gateway.weather import NOW, WEATHER

VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 2**70, 0.5, -1e308, "", "auto", "é\n", "<tool_call>", "\ud83d"),
    *([], [[]], [None], ["a", "a"], {}, {"type": 5}, {"a": {}}, {"$ref": "#/$defs/x"}, {"type": "object"}),
]
TURNS: dict[str, Any] = {
    "model": "echo",
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "b"}]},
    ],
    "tools": [WEATHER.to_template(), NOW.to_template()],
    "chat_template_kwargs": {"enable_thinking": True},
}
MORE: dict[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "stop": ["x"],
    "n": 2,
    "logit_bias": {"3": 1},
    "seed": 1,
    "max_tokens": 3,
    "top_p": 0.5,
}
FORCED = {**TURNS, "tool_choice": {"type": "function", "function": {"name": "now"}}, "stream": True, "logprobs": True}
COMPLETION = {**MORE, "prompt": ["a", "b"], "echo": True, "logprobs": 2}
SHAPED = {"prompt": [1, 2], "structured_outputs": {"choice": ["a", "b"]}, "stop_token_ids": [3], "stream": True}
TOOL = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
RESPONSE: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call_output", "call_id": "a", "output": "b"},
        {"type": "reasoning", "encrypted_content": "expertmesh:eA=="},
    ],
    "instructions": "be brief",
    "tools": [TOOL],
    "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
    "max_output_tokens": 3,
    "truncation": "auto",
    "metadata": {"a": "b"},
    "enable_thinking": True,
}
SHAPED_RESPONSE = {
    "input": "x",
    "tools": [TOOL],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]},
    "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "stream_options": {"include_obfuscation": False},
    "previous_response_id": None,
    "stream": True,
}
STARTS = [
    ("/v1/chat/completions", {**TURNS, **MORE}),
    ("/v1/chat/completions", FORCED),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", SHAPED),
    ("/v1/responses", RESPONSE),
    ("/v1/responses", SHAPED_RESPONSE),
    ("/v1/responses/input_tokens", RESPONSE),
    ("/tokenize", TURNS),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside the JSON value `value`; a path is a tuple of keys and indices."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def mutate(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return a copy of `body` in which one or two randomly chosen values are replaced by random elements of VALUES."""
    body = copy.deepcopy(body)
    for _ in range(rng.randrange(1, 3)):
        *path, last = rng.choice(list(paths(body)))
        owner: Any = body
        for key in path:
            owner = owner[key]
        owner[last] = copy.deepcopy(rng.choice(VALUES))
    return body


@pytest.mark.parametrize("max_model_len", [2000])
def test_wrong_bodies(http: httpx.Client, source: EchoSource) -> None:
    rng = random.Random(4)
    num_answered = 0
    for path, start in STARTS:
        for _ in range(250):
            body = mutate(start, rng)
            content = json.dumps(body).encode()
            answer = http.post(path, content=content)
            assert answer.status_code in (200, 400, 404), (answer.text, body)
            assert "Traceback" not in answer.text
            num_answered += answer.status_code == 200
            if answer.status_code == 400:
                sentence = answer.json()["error"]["message"]
                assert sentence.endswith("."), (sentence, body)
    assert num_answered > 50
    assert not source.active
