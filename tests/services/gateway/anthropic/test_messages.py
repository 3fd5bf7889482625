"""The tests talk to the Messages API with the real `anthropic` client; a script takes the place of the engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.beta import BetaRawMessageStreamEvent

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.gateway.chat.tokenizer import Tokenizer
from tests.services.gateway.conftest import MAX_BODY_BYTES
from tests.services.gateway.echo import EchoSource
from tests.services.gateway.weather import ARGUMENTS, CALL, CALL_NOW, WEATHER

USER: Any = {"role": "user", "content": "hi"}
TOOLS: Any = [
    {"name": "get_weather", "description": "Tells the weather.", "input_schema": dict(WEATHER.parameters)},
    {"type": "custom", "name": "now", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}},
]
# A template that shows all of a conversation, so that a test can compare the whole prompt.
SHOW_ALL = (
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.tool_call_id if m.tool_call_id }}: "
    "{{ '(' + m.reasoning_content + ')' if m.reasoning_content }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}]"
    "{% endfor %}{% if add_generation_prompt %}{{ '<think>' if enable_thinking else '>' }}{% endif %}"
)


@pytest.fixture
def ai(url: str) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(verify=False)  # there is no TLS, and reading the CA certificates takes 40 ms
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, http_client=http) as client:
        yield client


@pytest.fixture
def max_model_len() -> int:
    return 2000


def say(source: EchoSource, tokenizer: Tokenizer, text: str) -> None:
    source.script = tokenizer.encode(text)


def ask(ai: anthropic.Anthropic, **more: Any) -> Message:
    fields = {"model": "echo", "max_tokens": 900, "messages": [USER], **more}
    message: Message = ai.messages.create(**fields)
    return message


def ask_stream(ai: anthropic.Anthropic, **more: Any) -> Message:
    fields = {"model": "echo", "max_tokens": 900, "messages": [USER], **more}
    with ai.messages.stream(**fields) as stream:
        return stream.get_final_message()


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream. Each event must have the type that names it, and only fields of its type."""
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        if found[-1]["type"] != "ping":
            for union in (RawMessageStreamEvent, BetaRawMessageStreamEvent):
                assert_known(pydantic.TypeAdapter[Any](union).validate_python(found[-1]))
    return found


def assert_known(value: Any) -> None:
    """Check that the client's types know every field of `value`."""
    if isinstance(value, pydantic.BaseModel):
        assert not value.model_extra, value.model_extra
        for name in value.model_fields_set:
            assert_known(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            assert_known(item)


def test_a_message(ai: anthropic.Anthropic, source: EchoSource) -> None:
    source.cached = (3, "hit")
    raw = ai.messages.with_raw_response.create(model="echo", max_tokens=40, messages=[USER])
    message = raw.parse()
    assert_known(message)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "user\nhi"}]
    assert (message.role, message.model, message.type) == ("assistant", "echo", "message")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id == f"msg_{raw.headers['request-id']}"
    assert raw.headers["x-request-id"] == raw.headers["request-id"]
    assert raw.headers["x-expertmesh-cache"] == "hit; cached=3"
    usage = message.usage
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens, usage.output_tokens) == (3, 0, 9)
    counted = ai.messages.count_tokens(model="echo", messages=[USER]).input_tokens
    assert counted == usage.input_tokens + 3 == 21


@pytest.mark.parametrize("tokens_per_output", [1, 5])
def test_stream_events(http: httpx.Client, source: EchoSource, tokenizer: Tokenizer, tokens_per_output: int) -> None:
    say(source, tokenizer, "user\nhi")
    source.tokens_per_output, source.cached = tokens_per_output, (3, "hit")
    body = {"model": "echo", "max_tokens": 40, "messages": [USER], "stream": True}
    answer = http.post("/v1/messages", json=body, headers={"x-request-id": "me"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["request-id"] == "me"
    start, ping, opened, *deltas, closed, delta, stop = events_of(answer.text)
    assert start["message"]["id"] == "msg_me"
    assert start["message"]["usage"]["input_tokens"] == 18
    assert ping == {"type": "ping"}
    assert opened == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert "".join(event["delta"]["text"] for event in deltas) == "user\nhi"
    assert closed == {"type": "content_block_stop", "index": 0}
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 8
    assert delta["usage"]["cache_read_input_tokens"] == 3
    assert stop == {"type": "message_stop"}


def test_stream_holds_no_line_ends_but_its_own(ai: anthropic.Anthropic, http: httpx.Client) -> None:
    ends = "a\u2028b\u2029c\u0085d"
    messages = [{"role": "user", "content": ends}]
    answer = http.post("/v1/messages", json={"model": "echo", "max_tokens": 50, "messages": messages, "stream": True})
    assert not set(ends[1::2]) & set(answer.text)
    assert ask_stream(ai, messages=messages).content[0].to_dict()["text"] == f"user\n{ends}"


@pytest.mark.parametrize("way", [ask, ask_stream])
def test_why_an_answer_ends(ai: anthropic.Anthropic, way: Any) -> None:
    message = way(ai, messages=[{"role": "user", "content": "one<end>two"}], stop_sequences=["nothing", "<end>"])
    assert [block.text for block in message.content] == ["user\none"]
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "<end>")
    message = way(ai, max_tokens=4)
    assert ([block.text for block in message.content], message.stop_reason) == (["use"], "max_tokens")
    assert (message.stop_sequence, message.usage.output_tokens) == (None, 4)


@pytest.mark.parametrize("way", [ask, ask_stream])
@pytest.mark.parametrize("tokens_per_output", [1, 7, 500])
def test_tool_use(
    ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer, way: Any, tokens_per_output: int
) -> None:
    say(source, tokenizer, f"Let me see.\n{CALL}\n{CALL_NOW}")
    source.tokens_per_output = tokens_per_output
    message = way(ai, tools=TOOLS)
    text, weather, now = message.content
    assert (text.text, message.stop_reason) == ("Let me see.", "tool_use")
    assert (weather.type, weather.name, weather.input) == ("tool_use", "get_weather", ARGUMENTS)
    assert (now.name, now.input) == ("now", {})
    assert weather.id.startswith("toolu_")
    assert weather.id != now.id
    # The message is sent back unchanged, with a result.
    result = {"type": "tool_result", "tool_use_id": weather.id, "content": [{"type": "text", "text": "sunny"}]}
    turns: list[Any] = [USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert way(ai, messages=turns, tools=TOOLS).stop_reason == "tool_use"


@pytest.mark.parametrize("way", [ask, ask_stream])
def test_text_between_and_after_calls(
    ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer, way: Any
) -> None:
    say(source, tokenizer, f"a {CALL_NOW} b {CALL_NOW} c")
    message = way(ai, tools=TOOLS)
    assert sorted(block.type for block in message.content if block.type == "tool_use") == ["tool_use"] * 2
    assert "".join(block.text for block in message.content if block.type == "text").split() == ["a", "b", "c"]
    if way is ask_stream:
        assert [block.type for block in message.content] == ["text", "tool_use", "text", "tool_use", "text"]


def test_tool_choice(ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer) -> None:
    say(source, tokenizer, f"{CALL_NOW}{CALL_NOW}")
    assert len(ask(ai, tools=TOOLS).content) == 2
    alone = ask(ai, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in alone.content] == ["tool_use"]
    assert source.seen[-1].grammar is None
    for choice in ({"type": "any"}, {"type": "tool", "name": "now"}):
        assert ask(ai, tools=TOOLS, tool_choice=choice).stop_reason == "tool_use"
        assert source.seen[-1].grammar is not None
    text = ask(ai, tools=TOOLS, tool_choice={"type": "none"}).content[0]
    assert (text.type, text.to_dict()["text"]) == ("text", f"{CALL_NOW}{CALL_NOW}")


@pytest.mark.parametrize("way", [ask, ask_stream])
def test_a_call_that_is_cut_off(ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer, way: Any) -> None:
    say(source, tokenizer, CALL)
    num_tokens = len(tokenizer.encode(CALL[: CALL.index("3")]))
    message = way(ai, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=num_tokens)
    [call] = message.content
    assert (message.stop_reason, call.name, call.input) == ("max_tokens", "get_weather", {"city": ARGUMENTS["city"]})
    turns: list[Any] = [USER, {"role": "assistant", "content": message.content}]
    turns.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "is_error": True}]})
    assert way(ai, messages=turns, tools=TOOLS).content


@pytest.mark.parametrize("way", [ask, ask_stream])
def test_half_a_surrogate_pair(ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer, way: Any) -> None:
    tool = {"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "array"}}}}
    value = '["\\ud83d", "\\ud83d\\ude00", "\\\\ud83d"]'
    say(
        source, tokenizer, f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>\n</tool_call>"
    )
    message = way(ai, tools=[tool])
    assert message.content[0].input == {"x": ["\ufffd", "😀", "\\ud83d"]}
    turns: list[Any] = [USER, {"role": "assistant", "content": message.content}, USER]
    assert way(ai, messages=turns, tools=[tool]).content


def test_the_tool_runner(ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: the name of the city

        """
        asked.append(city)
        say(source, tokenizer, "It is sunny.")
        return "sunny"

    for is_streamed in (False, True):
        say(source, tokenizer, CALL.partition("\n<parameter=days>")[0] + "\n</function>\n</tool_call>")
        runner: Any = ai.beta.messages.tool_runner(
            model="echo", max_tokens=500, messages=[USER], tools=[get_weather], stream=is_streamed
        )
        last = runner.until_done()
        assert [block.text for block in last.content] == ["It is sunny."]
    assert asked == [ARGUMENTS["city"]] * 2


@pytest.mark.parametrize("way", [ask, ask_stream])
def test_thinking(ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer, way: Any) -> None:
    say(source, tokenizer, f"First.\n</think>\n\nThen. {CALL_NOW}")
    message = way(ai, thinking={"type": "enabled", "budget_tokens": 50}, tools=TOOLS)
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking, text.text, call.name) == ("thinking", "First.", "Then. ", "now")
    assert thinking.signature
    assert message.usage.output_tokens_details.thinking_tokens == len(tokenizer.encode("First.\n</think>"))
    assert budget_of(source) == 50
    hidden = way(ai, thinking={"type": "adaptive", "display": "omitted"}).content[0]
    assert (hidden.type, hidden.thinking, hidden.signature) == ("thinking", "", thinking.signature)
    assert budget_of(source) is None
    way(ai, thinking={"type": "adaptive"}, output_config={"effort": "low"}, max_tokens=1500)
    assert budget_of(source) == 512
    for off in ({}, {"thinking": {"type": "disabled"}}, {"output_config": {"effort": "low"}}):
        assert [block.type for block in way(ai, **off).content] == ["text"]


def budget_of(source: EchoSource) -> int | None:
    budget = source.seen[-1].thinking_budget
    return budget and budget.max_tokens


def prompt_of(ai: anthropic.Anthropic, source: EchoSource, turns: list[Any], **more: Any) -> str:
    """Return the prompt that the chat template renders; the engine's script is the prompt itself."""
    source.script = None
    return str(ask(ai, messages=turns, **more).content[0].to_dict()["text"])


def test_prompts(
    ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer._hf, "chat_template", SHOW_ALL)
    text: Any = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "citations": None}
    assert prompt_of(ai, source, [USER], system="be") == "[system: be][user: hi]>"
    assert prompt_of(ai, source, [USER], system=[text, text]) == "[system: a\na][user: hi]>"
    assert prompt_of(ai, source, [USER, {"role": "system", "content": "now"}, USER]) == (
        "[user: hi][system: now][user: hi]>"
    )
    # Neighbours of one role become one message, as Anthropic's reference says.
    assert prompt_of(ai, source, [USER, {"role": "user", "content": [text, text]}]) == "[user: hi\na\na]>"
    calls: Any = [
        {"type": "thinking", "thinking": "so", "signature": "any"},
        {"type": "redacted_thinking", "data": "x"},
        text,
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}, "caller": {"type": "direct"}},
        {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
    ]
    results: Any = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [text, text], "cache_control": None},
        {"type": "tool_result", "tool_use_id": "t2", "content": "bad", "is_error": True},
        {"type": "text", "text": "go on"},
    ]
    turns: list[Any] = [
        USER,
        {"role": "assistant", "content": calls, "id": "msg_1"},
        {"role": "user", "content": results},
    ]
    assert prompt_of(ai, source, turns) == (
        '[user: hi][assistant: (so)a f{"x": 1} g{}][tool t1: a\na][tool t2: Error: bad][user: go on]>'
    )
    assert prompt_of(ai, source, [USER, {"role": "assistant", "content": []}]) == "[user: hi]>"


def test_prefill(
    ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer._hf, "chat_template", SHOW_ALL)
    for content in ("so it", [{"type": "text", "text": "so"}, {"type": "text", "text": " it"}]):
        turns: list[Any] = [USER, {"role": "assistant", "content": content}]
        assert prompt_of(ai, source, turns) == "[user: hi][assistant: so it"
        assert ask(ai, messages=turns, max_tokens=1).usage.input_tokens == (
            ai.messages.count_tokens(model="echo", messages=turns).input_tokens
        )
    thought: Any = {"type": "thinking", "thinking": "so", "signature": "x"}
    [block] = ask(ai, messages=[USER, {"role": "assistant", "content": [thought]}]).content
    assert (block.type, block.to_dict()["thinking"]) == ("thinking", "[user: hi][assistant: (so")


def test_a_template_that_cannot_be_continued(
    http: httpx.Client, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer._hf, "chat_template", "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    turns = [USER, {"role": "assistant", "content": "so"}]
    answer = http.post("/v1/messages", json={"model": "echo", "max_tokens": 9, "messages": turns})
    assert answer.json()["error"]["message"].startswith("The last message may not be the assistant's, because ")


def test_structured_output(ai: anthropic.Anthropic, source: EchoSource, tokenizer: Tokenizer) -> None:
    class Place(pydantic.BaseModel):
        city: str
        days: int

    say(source, tokenizer, '{"city": "Rome", "days": 2}')
    parsed = ai.messages.parse(model="echo", max_tokens=100, messages=[USER], output_format=Place)
    assert parsed.parsed_output == Place(city="Rome", days=2)
    grammar = source.seen[-1].grammar
    assert grammar is not None
    assert json.loads(grammar.text)["required"] == ["city", "days"]


def test_counting_equals_the_usage(ai: anthropic.Anthropic) -> None:
    turns: list[Any] = [USER, {"role": "assistant", "content": "yes"}, USER]
    for more in ({}, {"system": "be"}, {"thinking": {"type": "adaptive"}}, {"tools": TOOLS}):
        counted = ai.messages.count_tokens(model="echo", messages=turns, **more)
        assert counted.input_tokens == ask(ai, messages=turns, **more).usage.input_tokens
    beta = ai.beta.messages.count_tokens(model="echo", messages=turns, betas=["token-counting-2024-11-01"])
    assert beta.input_tokens == ai.messages.count_tokens(model="echo", messages=turns).input_tokens


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "type_", "kind"),
    [
        (EngineOverloaded("Try later."), 529, "overloaded_error", anthropic.InternalServerError),
        (EngineFailed("The step failed."), 500, "api_error", anthropic.InternalServerError),
        (DeadlinePassed("Too late."), 504, "timeout_error", anthropic.InternalServerError),
        (ValueError("messages are odd."), 400, "invalid_request_error", anthropic.BadRequestError),
        (KeyError("x"), 500, "api_error", anthropic.InternalServerError),
    ],
)
def test_refusals_by_the_engine(
    ai: anthropic.Anthropic,
    source: EchoSource,
    error: Exception,
    status: int,
    type_: str,
    kind: type[anthropic.APIStatusError],
    is_streamed: bool,
) -> None:
    source.fails = error
    with pytest.raises(kind) as refused:
        (ask_stream if is_streamed else ask)(ai)
    assert (refused.value.status_code, refused.value.type) == (status, type_)
    body: Any = refused.value.body
    assert body.keys() == {"type", "error", "request_id"}
    assert body["request_id"] == refused.value.request_id
    assert refused.value.response.headers.get("retry-after") == ("1" if status == 529 else None)


def test_the_client_retries_when_the_server_is_busy(url: str, source: EchoSource) -> None:
    source.fails = EngineOverloaded("Try later.", retry_after=0)
    with (
        anthropic.Anthropic(base_url=url, api_key="any", max_retries=2) as client,
        pytest.raises(anthropic.APIStatusError),
    ):
        ask(client)
    assert len(source.seen) == 3


def test_a_failure_within_a_stream_is_an_event(ai: anthropic.Anthropic, http: httpx.Client, source: EchoSource) -> None:
    source.fails, source.num_good = EngineFailed("The step failed."), 2
    with pytest.raises(anthropic.APIStatusError, match=r"The step failed\.") as failed:
        ask_stream(ai)
    assert failed.value.type == "api_error"
    body = {"model": "echo", "max_tokens": 40, "messages": [USER], "stream": True}
    *_, last = http.post("/v1/messages", json=body).text.removesuffix("\n\n").split("\n\n")
    assert last.startswith("event: error\n")
    assert not source.active


def test_refusals_before_the_engine(ai: anthropic.Anthropic, http: httpx.Client) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        ask(ai, model="claude")
    assert unknown.value.type == "not_found_error"
    with pytest.raises(anthropic.RequestTooLargeError) as large:
        ask(ai, messages=[{"role": "user", "content": "a" * MAX_BODY_BYTES}])
    assert large.value.api_message == "The body must be at most 100000 bytes long, but is longer."
    assert (large.value.body or {})["error"]["type"] == "request_too_large"  # type: ignore[index]
    for answer, status, type_ in [
        (http.get("/v1/messages"), 405, "invalid_request_error"),
        (http.put("/v1/messages/count_tokens"), 405, "invalid_request_error"),
        (http.post("/v1/messages/batches", json={}), 404, "not_found_error"),
        (http.post("/v1/messages", content=b"{"), 400, "invalid_request_error"),
        (http.post("/v1/messages", json={}, headers={"x-request-id": "a" * 200}), 400, "invalid_request_error"),
    ]:
        assert answer.status_code == status
        assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", type_)
        assert answer.json()["request_id"].startswith(answer.headers["request-id"])
    assert "type" not in http.get("/v1/messagesx").json()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_away_frees_the_engine(url: str, source: EchoSource, is_streamed: bool) -> None:
    source.pause = 0.02 if is_streamed else 60
    body = json.dumps({"model": "echo", "max_tokens": 60, "messages": [USER], "stream": is_streamed}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not source.active:
            time.sleep(0.005)
        if is_streamed:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            source.pause = 60
    deadline = time.monotonic() + 60
    while source.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not source.active
