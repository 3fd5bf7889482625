from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.gateway.generation import Generation
from services.gateway.health import Health
from tests.services.gateway.echo import EchoSource
from tests.services.gateway.openai.refusals import check_refused


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="naïve 🦜", max_tokens=40)
    assert answer.choices[0].text == "naïve 🦜"
    assert (answer.choices[0].finish_reason, answer.choices[0].index) == ("stop", 0)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "echo"
    assert answer.usage is not None
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (11, 12, 23)  # the last token of the answer is the end of sequence


def test_streamed_completion(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="echo", prompt="naïve 🦜", max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "naïve 🦜"
    assert all("\ufffd" not in text for text in texts)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices] == [None] * 7 + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 23
    assert len({chunk.id for chunk in chunks}) == 1


def test_max_tokens_and_its_defaults(client: openai.OpenAI, source: EchoSource) -> None:
    assert client.completions.create(model="echo", prompt="abcdefgh", max_tokens=3).choices[0].text == "abc"
    answer = client.completions.create(model="echo", prompt="a" * 40)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a" * 16, "length")
    assert client.completions.create(model="echo", prompt="a" * 60).choices[0].text == "a" * 4
    client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
    client.completions.create(model="echo", prompt="abc", max_tokens=-1)
    client.completions.create(model="echo", prompt="a" * 60, max_tokens=1000, extra_body={"min_tokens": 900})
    assert [params.max_tokens for params in source.seen] == [3, 16, 4, None, None, 4]
    assert source.seen[-1].min_tokens == 4


def test_every_kind_of_prompt(client: openai.OpenAI, generation: Generation) -> None:
    ids = client.completions.create(model="echo", prompt=[0, 1, 2]).choices[0].text
    assert len(ids) == 3
    for prompt in (["one", "two"], [[65, 66], [67]]):
        answer = client.completions.create(model="echo", prompt=prompt)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert len({choice.text for choice in answer.choices}) == 2
    stream = client.completions.create(model="echo", prompt=["one", "three"], stream=True)
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "one", 1: "three"}


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hello"}])
    message = answer.choices[0].message
    # The echoed prompt ends with the special token that ends the message, which has no text.
    assert (message.role, message.content) == ("assistant", "user\nhello")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    # Clients may send the message of an answer back unchanged, as the next request does.
    turns: list[Any] = [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, message]
    again = client.chat.completions.create(model="echo", messages=turns, max_completion_tokens=9)
    assert again.choices[0].message.content == "system\nx"


def test_streamed_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    with client.chat.completions.stream(model="echo", messages=messages) as stream:
        content = stream.get_final_completion().choices[0].message.content
    assert content == "user\nhello"
    chunks = list(client.chat.completions.create(model="echo", messages=messages, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "user\nhello"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stream_format(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "ab", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["finish_reason"] is None


@pytest.mark.parametrize("tokens_per_output", [1, 3, 64])
def test_stop_string(client: openai.OpenAI, source: EchoSource, tokens_per_output: int) -> None:
    source.tokens_per_output = tokens_per_output
    extra = {"ignore_eos": True}
    answer = client.completions.create(model="echo", prompt="hello<stop>x", stop="<stop>", extra_body=extra)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9  # "hello" has three tokens, and "<stop>" has six
    assert not source.active
    stream = client.completions.create(
        model="echo", prompt="hello<sto<stop>", stop=["nothing", "<stop>"], stream=True, max_tokens=30, extra_body=extra
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "hello<sto"
    assert not source.active


def test_text_held_back_is_shown_at_the_end(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="abc<st", stop="<stop>")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc<st", "stop")


def test_stop_strings_wait_for_min_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="a.b.c.d", stop=".", extra_body={"min_tokens": 3})
    assert answer.choices[0].text == "a.b"


def test_sampling_reaches_the_engine(client: openai.OpenAI, source: EchoSource) -> None:
    client.completions.create(
        model="echo", prompt="a", temperature=0, top_p=0.5, seed=7, stop=["x"], max_tokens=5, user="me", n=1,
        presence_penalty=0, extra_body={"top_k": 4, "stop_token_ids": [9], "ignore_eos": True, "min_tokens": 2},
    )  # fmt: skip
    params = source.seen[0]
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0, 0.5, 4, 7)
    assert (params.stop, params.stop_token_ids, params.ignore_eos, params.min_tokens) == (("x",), (9,), True, 2)
    client.completions.create(model="echo", prompt="a")
    assert source.seen[1] == type(params)(max_tokens=16)


def test_unknown_routes_methods_and_models(http: httpx.Client) -> None:
    check_refused(http.get("/v1/nothing"), 404, "There is no path /v1/nothing; /v1/models lists the served models.")
    check_refused(http.get("/v1/completions"), 405, "/v1/completions must be requested with POST, not GET.")
    for answer in (http.post("/v1/completions", json={"model": "gpt", "prompt": "a"}), http.get("/v1/models/gpt")):
        error = check_refused(answer, 404, "The model 'gpt' does not exist; this server serves 'echo'.", "model")
        assert error["code"] == "model_not_found"


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            EngineOverloaded("Too many requests are waiting; try again later."),
            429,
            "Too many requests are waiting; try again later.",
        ),
        (EngineFailed("The step failed."), 500, "The step failed."),
        (DeadlinePassed("Too late."), 504, "Too late."),
        (ValueError("prompt holds the token id 9999; allowed are 0 to 99."), 400, "prompt holds the token id 9999;"),
        (KeyError("x"), 500, "The server failed; its log says more."),
    ],
)
def test_refusals_by_the_engine(
    http: httpx.Client, source: EchoSource, error: Exception, status: int, message: str, is_streamed: bool
) -> None:
    source.fails = error
    answer = http.post("/v1/completions", json={"prompt": "ab", "stream": is_streamed})
    check_refused(answer, status, message)
    assert answer.headers.get("retry-after") == ("1" if status == 429 else None)


def test_a_failure_within_a_stream_ends_it_with_an_error(client: openai.OpenAI, source: EchoSource) -> None:
    source.fails, source.num_good = EngineFailed("The step failed."), 2
    stream = client.completions.create(model="echo", prompt="abcd", stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match=r"The step failed\."):
        texts.extend(chunk.choices[0].text for chunk in stream)
    with pytest.raises(openai.InternalServerError, match=r"The step failed\."):
        client.completions.create(model="echo", prompt=["abcd", "efgh"])
    assert not source.active


def test_an_engine_that_ends_without_a_reason(http: httpx.Client, source: EchoSource) -> None:
    source.forgets_reason = True
    answer = http.post("/v1/completions", json={"prompt": "ab"})
    check_refused(answer, 500, "The engine ended the request without a finish reason.")


def _wait_until_idle(source: EchoSource) -> None:
    deadline = time.monotonic() + 60
    while source.active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not source.active


@pytest.mark.parametrize("num_good_first", [0, 1])
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("prompt", ["ab", ["ab", "cd"]])
def test_a_client_that_goes_away_frees_the_engine(
    url: str, source: EchoSource, prompt: str | list[str], is_streamed: bool, num_good_first: int
) -> None:
    source.pause = 0.02 if num_good_first else 60
    body = json.dumps({"prompt": prompt, "stream": is_streamed, "ignore_eos": True, "max_tokens": 60}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not source.active:
            time.sleep(0.005)
        if is_streamed and num_good_first:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            source.pause = 60  # the disconnect must be noticed although no further token comes
    _wait_until_idle(source)


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "expertmesh"
    assert http.get("/v1/models/echo").json()["max_model_len"] == 64


def test_health(http: httpx.Client, health: dict[str, Health]) -> None:
    assert http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").json() == {"status": "ready", "detail": ""}
    health["now"] = Health(is_ready=True, is_degraded=True, detail="2 experts have one home.")
    answer = http.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    health["now"] = Health(is_ready=False, detail="0 of 3 shards are up.")
    answer = http.get("/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "not_ready", "detail": "0 of 3 shards are up."})


def test_metrics(client: openai.OpenAI, http: httpx.Client, source: EchoSource) -> None:
    client.completions.create(model="echo", prompt="abcd", max_tokens=3)
    client.completions.create(model="echo", prompt="abcd", stop="b", stream=True).close()
    http.post("/v1/completions", json={})
    _wait_until_idle(source)
    lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    label = '{model_name="echo"}'
    assert lines[f"expertmesh:time_to_first_token_seconds_count{label}"] == "2.0"
    assert lines[f"expertmesh:prompt_tokens_total{label}"] == "8.0"
    assert float(lines[f"expertmesh:inter_token_latency_seconds_count{label}"]) >= 2
    assert float(lines[f"expertmesh:generation_tokens_total{label}"]) >= 4
    assert lines[f"expertmesh:num_requests_open{label}"] == "0.0"
    assert lines['expertmesh:request_success_total{finished_reason="length",model_name="echo"}'] == "1.0"
    assert lines['expertmesh:request_refused_total{model_name="echo",reason="invalid"}'] == "1.0"
    assert lines["expertmesh:steps_total"] == "3.0"


def test_streams_hold_no_line_ends_but_their_own(client: openai.OpenAI, http: httpx.Client) -> None:
    text = "a\u2028b\u2029c\u0085d"  # some clients take these characters for the end of a line
    answer = http.post("/v1/completions", json={"prompt": text, "stream": True})
    assert not set("\u2028\u2029\u0085") & set(answer.text)
    stream = client.completions.create(model="echo", prompt=text, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text
