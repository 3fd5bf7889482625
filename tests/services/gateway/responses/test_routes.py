from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from services.engine.contract.errors import EngineFailed, EngineOverloaded
from services.gateway import answer
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation
from services.gateway.health import Health
from services.gateway.responses import turn
from services.gateway.responses.items import parse_items
from services.gateway.rest import build_rest
from tests.services.gateway.echo import EchoSource, serving
from tests.services.gateway.responses.conftest import LIMITS, MAX_LEN, TOOL, create

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL = "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>"


def events_of(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a streamed response, and check their form, their order and their numbers."""
    answer = http.post("/v1/responses", json={"input": "hi", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENTS.validate_python(event, strict=True)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def same_but_ids(value: Any) -> Any:
    """Return `value` with every id and time replaced by a constant."""
    if isinstance(value, dict):
        random = {"id", "item_id", "call_id", "created_at", "completed_at"}
        return {key: "*" if key in random and item else same_but_ids(item) for key, item in value.items()}
    return [same_but_ids(item) for item in value] if isinstance(value, list) else value


def prompt(source: EchoSource, tokenizer: Tokenizer, text: str) -> None:
    source.script = tokenizer.encode(text)


def test_a_response(client: openai.OpenAI, source: EchoSource) -> None:
    source.cached = (5, "hit")
    answer = create(client, instructions="be brief", metadata={"a": "b"}, temperature=0.5, max_output_tokens=100)
    assert answer.output_text == "system\nbe brief"
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "echo")
    assert answer.error is answer.incomplete_details is answer.previous_response_id is None
    assert (answer.instructions, answer.metadata, answer.temperature) == ("be brief", {"a": "b"}, 0.5)
    assert (answer.max_output_tokens, answer.parallel_tool_calls, answer.tool_choice) == (100, True, "auto")
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 5
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (source.seen[0].temperature, source.seen[0].max_tokens) == (0.5, 100)


def test_an_answer_that_is_cut_off(client: openai.OpenAI) -> None:
    answer = create(client, max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    message: Any = answer.output[0]
    assert (answer.output_text, message.status) == ("us", "incomplete")


def test_reasoning_and_calls(client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer) -> None:
    prompt(source, tokenizer, f"so\n</think>\n\nI call.\n{CALL}\n{CALL}")
    answer = create(client, tools=[TOOL], extra_body={"enable_thinking": True})
    kinds = [item.type for item in answer.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, first, second = answer.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert (reasoning.content[0].text, reasoning.summary, reasoning.encrypted_content) == ("so", [], None)
    assert message.type == "message"
    assert answer.output_text == "I call."
    assert first.type == second.type == "function_call"
    assert (first.name, json.loads(first.arguments)) == ("f", {"a": "x"})
    assert first.call_id != second.call_id
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == len(tokenizer.encode("so\n</think>"))


@pytest.mark.parametrize("tokens_per_output", [1, 7, 400])
@pytest.mark.parametrize("text", ["hé🦜", f"so</think>hi\n{CALL}\nand\n{CALL}", f"</think>{CALL}", "so", "</think>"])
def test_streams_end_with_the_same_response(
    http: httpx.Client, source: EchoSource, tokenizer: Tokenizer, text: str, tokens_per_output: int
) -> None:
    prompt(source, tokenizer, text)
    source.tokens_per_output = tokens_per_output
    body: dict[str, Any] = {"tools": [TOOL], "enable_thinking": "</think>" in text or text == "so", "top_logprobs": 2}
    body |= {"include": ["reasoning.encrypted_content"]}
    events = events_of(http, **body)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == []
    assert events[-1]["type"] == "response.completed"
    whole = http.post("/v1/responses", json={"input": "hi", **body}).json()
    assert same_but_ids(events[-1]["response"]) == same_but_ids(whole)
    check_deltas(events)


def check_deltas(events: list[dict[str, Any]]) -> None:
    """Check that the pieces of every item, joined, are the item at its end and in the whole response."""
    output = events[-1]["response"]["output"]
    for index, item in enumerate(output):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added"
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1] == own[-1] | {"type": "response.output_item.done", "item": item}
        deltas = [event for event in own if event["type"].endswith(".delta")]
        text = "".join(event["delta"] for event in deltas)
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        if item["type"] == "message":
            logprobs = [score for event in deltas for score in event["logprobs"]]
            assert logprobs == item["content"][0]["logprobs"]
            shown = b"".join(bytes(score["bytes"]) for score in logprobs).decode()
            assert text[:1] in shown


def test_logprobs_belong_to_the_text(client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer) -> None:
    prompt(source, tokenizer, "so</think>é!")
    for tokens in (1, 50):
        source.tokens_per_output = tokens
        include: Any = ["message.output_text.logprobs"]
        answer = create(client, include=include, top_logprobs=3, extra_body={"enable_thinking": True})
        part: Any = answer.output[1]
        logprobs = part.content[0].logprobs
        assert b"".join(bytes(score.bytes) for score in logprobs).decode() == "é!<|im_end|>"
        assert [len(score.top_logprobs) for score in logprobs] == [3] * len(logprobs)


def test_the_official_clients_helpers(client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer) -> None:
    class Unit(BaseModel):
        unit: str

    prompt(source, tokenizer, '{"unit": "C"}')
    parsed = client.responses.parse(model="echo", input="hi", text_format=Unit)
    assert parsed.output_parsed == Unit(unit="C")
    form: Any = parsed.text
    assert (form.format.type, form.format.name, form.format.strict) == ("json_schema", "Unit", True)
    with client.responses.stream(model="echo", input="hi", text_format=Unit) as stream:
        assert "response.output_text.done" in [event.type for event in stream]
        assert stream.get_final_response().output_parsed == Unit(unit="C")
    prompt(source, tokenizer, CALL)
    with client.responses.stream(model="echo", input="hi", tools=[TOOL]) as stream:  # type: ignore[list-item]
        call = stream.get_final_response().output[0]
    assert call.type == "function_call"
    assert call.arguments == '{"a": "x"}'


def test_output_may_be_sent_back(client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer) -> None:
    """Check that a conversation sent back by value equals the same conversation continued in the store."""
    prompt(source, tokenizer, f"so</think>hi\n{CALL}")
    include: Any = ["reasoning.encrypted_content"]
    extra = {"enable_thinking": True}
    first = create(client, tools=[TOOL], include=include, extra_body=extra)
    call: Any = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    turns: list[Any] = [{"role": "user", "content": "hi"}, *first.output, result]
    by_value = create(client, input=turns)
    by_name = create(client, input=[result], previous_response_id=first.id)
    by_item = create(
        client, input=[turns[0], *({"type": "item_reference", "id": item.id} for item in first.output), result]
    )
    assert first.usage is not None
    lengths = [answer.usage.input_tokens for answer in (by_value, by_name, by_item) if answer.usage]
    assert lengths[0] > first.usage.input_tokens
    assert len(set(lengths)) == 1
    assert by_name.previous_response_id == first.id


def test_a_call_that_was_cut_off_may_be_sent_back(
    client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer
) -> None:
    prompt(source, tokenizer, CALL)
    cut = len(tokenizer.encode(CALL[: CALL.index("x")])) + 1
    first = create(client, tools=[TOOL], tool_choice="required", max_output_tokens=cut)
    call: Any = first.output[0]
    assert (first.status, call.status, call.arguments) == ("incomplete", "incomplete", '{"a": "x')
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    by_name = create(client, input=[output], previous_response_id=first.id)
    by_value = create(client, input=[{"role": "user", "content": "hi"}, call, output])
    assert by_name.usage is not None
    assert by_value.usage is not None
    assert by_name.usage.input_tokens == by_value.usage.input_tokens
    messages: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": call.arguments}}]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
    ]
    client.chat.completions.create(model="echo", messages=messages)


def test_conversations_in_the_store(client: openai.OpenAI, source: EchoSource) -> None:
    first = create(client, input="one", instructions="first")
    second = create(client, input="two", previous_response_id=first.id, instructions="second")
    # The instructions of earlier responses are not carried over, as in OpenAI's API.
    assert second.output_text == "system\nsecond"
    items = client.responses.input_items.list(second.id, order="asc")
    texts = [item.content[0].text for item in items.data]  # type: ignore[union-attr]
    assert texts == ["one", "system\nfirst", "two"]
    assert [item.id for item in client.responses.input_items.list(second.id)] == [item.id for item in items][::-1]
    page = client.responses.input_items.list(second.id, order="asc", limit=1, after=items.data[0].id)
    assert [item.id for item in page.data] == [items.data[1].id]
    assert page.has_more
    assert client.responses.retrieve(first.id) == first
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="is not stored here"):
        client.responses.retrieve(first.id)
    third = create(client, input="three", previous_response_id=second.id)
    assert third.usage is not None
    assert second.usage is not None
    assert third.usage.input_tokens > second.usage.input_tokens - len("system\nsecond")


def test_what_is_not_stored(client: openai.OpenAI, http: httpx.Client, source: EchoSource) -> None:
    unstored = create(client, store=False)
    with pytest.raises(openai.NotFoundError) as error:
        create(client, previous_response_id=unstored.id)
    body: Any = error.value.body
    assert body["code"] == "previous_response_not_found"
    assert body["param"] == "previous_response_id"
    assert "restart" in body["message"]
    assert "another gateway" in body["message"]
    for path in ("", "/input_items"):
        assert http.get(f"/v1/responses/{unstored.id}{path}").status_code == 404
    stream = events_of(http)
    assert client.responses.retrieve(stream[-1]["response"]["id"]).output_text == "user\nhi"
    source.fails, source.num_good = EngineFailed("The backbone was lost."), 2
    failed = events_of(http)[-1]["response"]
    assert http.get(f"/v1/responses/{failed['id']}").status_code == 404


def test_the_store_is_bounded(client: openai.OpenAI, http: httpx.Client) -> None:
    answers = [create(client) for _ in range(4)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answers[0].id)
    client.responses.retrieve(answers[1].id)  # counts as use, so answers[2] is the oldest now
    create(client)
    assert [http.get(f"/v1/responses/{one.id}").status_code for one in answers] == [404, 200, 404, 200]
    large = create(client, metadata={"large": "x" * 25_000})
    assert http.get(f"/v1/responses/{large.id}").status_code == 404
    assert http.get(f"/v1/responses/{answers[3].id}").status_code == 200


def test_references_cannot_multiply(client: openai.OpenAI, http: httpx.Client) -> None:
    """Check that a short request cannot name a long item so often that the gateway runs out of memory."""
    turns: list[Any] = [{"role": "user", "content": "x" * 9000}, {"role": "user", "content": "hi"}]
    first = create(client, input=turns, truncation="auto")
    long = client.responses.input_items.list(first.id).data[1].id
    refused = http.post("/v1/responses", json={"input": [{"type": "item_reference", "id": long}] * 100})
    assert refused.status_code == 413
    assert refused.json()["error"]["message"].startswith("The stored items that the input names may hold at most")


def test_the_number_of_items_is_limited(http: httpx.Client, client: openai.OpenAI) -> None:
    first = create(client, input="x")  # its conversation has two items
    parts = [{"type": "input_text", "text": ""}] * 100
    item = {"role": "user", "content": "x"}
    bodies: list[dict[str, Any]] = [
        {"input": [item] * 201},
        {"input": [item] * 199, "previous_response_id": first.id},
        {"input": [{"role": "user", "content": parts}] * 2},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": parts}] * 2},
    ]
    for body in bodies:
        refused = http.post("/v1/responses", json=body)
        assert refused.status_code == 400
        message = "input must hold at most 200 items and parts, with those of earlier responses, not 20"
        assert refused.json()["error"]["message"].startswith(message)


def test_many_items_are_read_in_a_thread(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"input": [{"role": "user", "content": "x"}] * 100}
    bad = {"input": [*body["input"], {"role": "user"}]}

    def ask() -> list[Any]:
        return [http.post("/v1/responses/input_tokens", json=one).json() for one in (body, bad)]

    inline = ask()
    assert inline[1]["error"]["message"] == "input[100].content is missing, but required."
    threads: set[str] = set()

    def noted(*args: Any) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        return parse_items(*args)

    monkeypatch.setattr(answer, "INLINE_BYTES", 99)
    monkeypatch.setattr(turn, "parse_items", noted)
    assert ask() == inline
    assert threads == {"gateway"}


@pytest.mark.parametrize("is_reference", [True, False])
def test_stored_items_are_read_in_a_thread(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, is_reference: bool
) -> None:
    first = http.post("/v1/responses", json={"input": "a" * 100, "truncation": "auto"}).json()
    monkeypatch.setattr(turn, "INLINE_BYTES", 99)
    threads: list[str] = []

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread().name.partition("_")[0])
        return parse_items(*args)

    monkeypatch.setattr(turn, "parse_items", noted)
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    body = {"input": references} if is_reference else {"input": "b", "previous_response_id": first["id"]}
    assert http.post("/v1/responses/input_tokens", json=body).status_code == 200
    assert threads == ["gateway"]


def test_truncation(client: openai.OpenAI, source: EchoSource, tokenizer: Tokenizer) -> None:
    turns: list[Any] = []
    for n in range(40):
        turns += [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    turns += [call, {"type": "function_call_output", "call_id": "c", "output": "done"}]
    turns.append({"role": "user", "content": "last"})
    with pytest.raises(openai.BadRequestError) as error:
        create(client, input=turns)
    body: Any = error.value.body
    assert (body["code"], body["param"]) == ("context_length_exceeded", "input")
    answer = create(client, input=turns, instructions="short", truncation="auto", max_output_tokens=50)
    assert answer.truncation == "auto"
    assert answer.usage is not None
    assert MAX_LEN - 50 - 60 < answer.usage.input_tokens <= MAX_LEN - 50
    assert answer.output_text.startswith("system\nshort")  # the instructions and the first words after them
    shown = create(client, input=turns, instructions="short", truncation="auto").output_text
    assert shown.startswith("system\nshort")
    whole = create(client, input=turns[-3:], truncation="auto")
    assert whole.output_text.startswith("assistant\n")
    with pytest.raises(openai.BadRequestError, match="context"):
        create(client, input="x" * 500, truncation="auto")


def test_errors_before_the_first_token_have_a_status(http: httpx.Client, source: EchoSource) -> None:
    source.fails = EngineOverloaded("Too many requests are waiting.")
    for stream in (True, False):
        answer = http.post("/v1/responses", json={"input": "hi", "stream": stream})
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_failure_in_the_middle_of_a_stream(http: httpx.Client, client: openai.OpenAI, source: EchoSource) -> None:
    source.fails, source.num_good = EngineFailed("The backbone was lost."), 3
    events = events_of(http)
    error, failed = events[-2:]
    assert (error["type"], error["message"], error["code"]) == ("error", "The backbone was lost.", "server_error")
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "The backbone was lost."}
    with pytest.raises(openai.InternalServerError, match=r"The backbone was lost\."):
        create(client)


def test_a_client_that_leaves_frees_the_engine(url: str, source: EchoSource) -> None:
    source.pause = 0.02
    for stream in (True, False):
        body = json.dumps({"input": "hi", "stream": stream, "ignore_eos": True}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait(lambda: bool(source.active))
        wait(lambda: not source.active)


def wait(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_tool_choice(client: openai.OpenAI, source: EchoSource) -> None:
    other = TOOL | {"name": "g"}
    choices: list[Any] = [
        {"type": "function", "name": "f"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
        "required",
    ]
    for choice in choices:
        answer = create(client, tools=[TOOL, other], tool_choice=choice)
        assert answer.tool_choice == choice or answer.tool_choice.model_dump() == choice  # type: ignore[union-attr]
    grammars = [params.grammar.text for params in source.seen if params.grammar]
    assert ["function=g" in grammar for grammar in grammars] == [False, False, True]
    create(client, tools=[TOOL], tool_choice="none")
    assert source.seen[-1].grammar is None


def test_other_endpoints(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = create(client)
    counted = client.responses.input_tokens.count(model="echo", input="hi")
    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens
    cancelled = http.post(f"/v1/responses/{answer.id}/cancel")
    assert cancelled.status_code == 400
    assert cancelled.json()["error"]["message"].startswith("Only a response with background=true can be cancelled")
    deleted = http.delete(f"/v1/responses/{answer.id}").json()
    assert deleted == {"id": answer.id, "object": "response", "deleted": True}
    assert http.delete(f"/v1/responses/{answer.id}").status_code == 404
    assert http.get(f"/v1/responses/{answer.id}?stream=true").status_code == 400
    again = create(client)
    for query in ("limit=0", "limit=x", f"limit={'9' * 5000}", "order=up"):
        assert http.get(f"/v1/responses/{again.id}/input_items?{query}").status_code == 400


def test_half_a_surrogate_pair_is_echoed(http: httpx.Client) -> None:
    text = '{"input": "hi", "metadata": {"a": "\\ud83d"}}'
    answer = http.post("/v1/responses", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text


def test_no_store_at_all(generation: Generation) -> None:
    async def check() -> Health:
        return Health(is_ready=True)

    generation.limits = LIMITS.model_copy(update={"stored_responses": 0})
    with serving(build_rest(generation, check)) as url, httpx.Client(base_url=url) as http:
        answer = http.post("/v1/responses", json={"input": "hi"}).json()
        assert answer["status"] == "completed"
        assert http.get(f"/v1/responses/{answer['id']}").status_code == 404
