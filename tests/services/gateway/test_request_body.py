from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from services.gateway.anthropic.messages_body import MessagesBody
from services.gateway.errors import ApiError
from services.gateway.limits import GatewayLimits
from services.gateway.openai.body import ChatBody, CompletionBody
from services.gateway.request_body import BLOCK, BaseBody, Integer, parse_body, shown

MANY = 2000
USER = {"role": "user", "content": "hi"}
# bodies with thousands of mistakes
MANY_MISTAKES: list[tuple[type[BaseBody], dict[str, Any]]] = [
    (ChatBody, {"messages": [1] * MANY}),
    (ChatBody, {"messages": [{}] * MANY}),
    (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (ChatBody, {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]}),
    (ChatBody, {"messages": [USER], "tools": [{"type": 1}] * MANY}),
    (ChatBody, {"messages": [USER], "functions": [{}] * MANY}),
    (ChatBody, {"messages": [USER], "stop": [1] * MANY}),
    (ChatBody, {"messages": [USER], "metadata": {str(n): n for n in range(MANY)}}),
    (ChatBody, {"messages": [USER], "logit_bias": {str(n): "" for n in range(MANY)}}),
    (ChatBody, {"messages": [USER], "tool_choice": {str(n): 1 for n in range(MANY)}}),
    (ChatBody, {"messages": [USER], **{str(n): 1 for n in range(MANY)}}),
    (CompletionBody, {"prompt": [None] * MANY}),
    (CompletionBody, {"prompt": "a", "stop_token_ids": ["x"] * MANY}),
    (CompletionBody, {"prompt": "a", "structured_outputs": {"choice": [1] * MANY}}),
    (MessagesBody, {"model": "m", "max_tokens": 1, "messages": [], "tools": [1] * MANY}),
]


@pytest.mark.parametrize(("kind", "body"), MANY_MISTAKES)
def test_the_errors_stop_early(kind: type[BaseBody], body: dict[str, Any]) -> None:
    with pytest.raises((ValidationError, ApiError)) as caught:
        kind.model_validate(body)
    assert not isinstance(caught.value, ValidationError) or caught.value.error_count() <= 10
    with pytest.raises(ApiError) as refused:
        parse_body(kind, json.dumps(body).encode())
    assert len(refused.value.message) < 500


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", '{"messages": %s}'),
        ("/v1/chat/completions", '{"messages": [], "chat_template_kwargs": {"a": %s}}'),
        ("/v1/completions", '{"prompt": %s}'),
        ("/v1/responses", '{"input": %s}'),
        ("/v1/messages", '{"messages": %s}'),
        ("/v1/messages/count_tokens", '{"messages": %s}'),
        ("/tokenize", '{"prompt": %s}'),
        ("/detokenize", '{"tokens": %s}'),
    ],
)
def test_deep_json(http: httpx.Client, path: str, body: str, caplog: pytest.LogCaptureFixture) -> None:
    answer = http.post(path, content=(body % ("[" * 40_000 + "]" * 40_000)).encode())
    assert answer.status_code == 400
    assert "The JSON of the body may be nested at most 128 levels deep, not 4000" in answer.json()["error"]["message"]
    assert not caplog.records


def test_deep_json_inside_of_a_string(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": '{"a": ' + "[" * 40_000 + "]" * 40_000 + "}"}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = http.post(path, json={"messages": messages})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(
            "messages[0].tool_calls[0].function.arguments may be nested at most 128 levels deep, not 40001."
        )
    schema = {"structured_outputs": {"json": '{"enum": [' + "[" * 40_000 + "]" * 40_000 + "]}"}}
    answer = http.post("/v1/completions", json={"prompt": "a", **schema})
    assert answer.status_code == 400, answer.text
    assert not caplog.records


def test_the_limits_of_the_operator_count() -> None:
    limits = GatewayLimits(json_depth=8, json_values=256, json_items=1000)
    nested = b'{"messages": [], "chat_template_kwargs": {"a": ' + b"[" * 7 + b"]" * 7 + b"}}"
    with pytest.raises(ApiError, match=r"^The JSON of the body may be nested at most 8 levels deep, not 9\.$"):
        parse_body(ChatBody, nested, limits)
    with pytest.raises(ApiError, match=r"^The JSON of the body may hold at most 256 objects, lists and strings, not"):
        parse_body(CompletionBody, json.dumps({"prompt": "a", "stop": ["x"] * 300}).encode(), limits)
    with pytest.raises(
        ApiError, match=r"^The JSON of the body may hold at most 1000 items in all lists and objects, not"
    ):
        parse_body(CompletionBody, json.dumps({"prompt": [1] * 1001}).encode(), limits)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_completion_token": 3}, "'max_completion_token'; the nearest allowed field is 'max_completion_tokens'."),
        ({"topp": 1}, "'topp'; the nearest allowed field is 'top_p'."),
        ({"x" * 5000: 1}, "'" + "x" * 100 + "'; docs/api.md lists the allowed fields."),
        (
            {"stream_options": {"include_usge": 1}},
            "'stream_options.include_usge'; the nearest allowed field is 'include_usage'.",
        ),
        ({"stream_options": {"x": 1}}, "'stream_options.x'; the allowed fields are continuous_usage_stats, include"),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_body(ChatBody, json.dumps({"messages": [USER], "stream": True, **more}).encode())
    assert refused.value.message.startswith(f"Unknown field {message}"), refused.value.message
    assert refused.value.code == "unknown_parameter"


class Numbers(BaseBody):
    one: Integer | None = None
    many: list[Integer] | None = None


def test_integral_numbers() -> None:
    assert parse_body(Numbers, b'{"one": 3.0, "many": [1e2, -0.0, 7]}') == Numbers(one=3, many=[100, 0, 7])
    for bad in ("3.5", "true", '"3"', "1e999", "[3]"):
        with pytest.raises(ApiError, match=r"^(one must be a valid integer, not |The body must hold only n)"):
            parse_body(Numbers, b'{"one": %s}' % bad.encode())


def test_values_in_errors_are_short() -> None:
    value: Any = ["x" * 100_000] * 100_000
    for _ in range(100_000):
        value = [value]
    assert len(shown(value)) <= 100
    assert shown([3]) == "[3]"


HUGE = ["1e309", "-1E+400", "1" + "0" * 310 + ".0", "9" * 210 + "e99", "0.001e400"]


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("place", ['{"messages": %s}', '{"messages": [], "chat_template_kwargs": {"a": [{"b": %s}]}}'])
def test_numbers_that_are_too_large(number: str, place: str) -> None:
    """Check that such numbers are refused: they would become infinite, and a response with an infinity is no JSON."""
    with pytest.raises(ApiError) as refused:
        parse_body(ChatBody, (place % number).encode())
    assert refused.value.message.startswith("The body must hold only numbers below 1.8e308, because")


@pytest.mark.parametrize("distance", range(0, 320, 20))
@pytest.mark.parametrize("number", HUGE)
def test_large_numbers_between_two_blocks(number: str, distance: int) -> None:
    before = b'{"messages": [], "chat_template_kwargs": {"b": "", "a": '
    text = before.replace(b'""', b'"%s"' % (b"x" * (BLOCK - len(before) - distance))) + number.encode() + b"}}"
    with pytest.raises(ApiError, match="only numbers below"):
        parse_body(ChatBody, text)


@pytest.mark.parametrize("number", ["1e308", "1e-400", '"1e400"', "9" * 300, "0.1e308", "-1.5E+307"])
def test_large_numbers_and_words_that_look_like_them(number: str) -> None:
    body = parse_body(ChatBody, b'{"messages": [], "chat_template_kwargs": {"a": %s}}' % number.encode())
    assert body.chat_template_kwargs == {"a": json.loads(number)}
