from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import generate_latest

from services.gateway.generation import Generation
from services.gateway.limits import GatewayLimits
from services.gateway.listener import ListenerConfig
from services.gateway.ports.http_protocol import MAX_PIPELINED
from tests.services.application import free_port
from tests.services.gateway.echo import EchoSource
from tests.services.gateway.listening import PlainConnection, connect, listening, run, until

LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b'{"prompt": "hello", "max_tokens": 3}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)


def limited(generation: Generation, **limits: float) -> ListenerConfig:
    """Give `generation` the `limits`, and return a config for a listener of its own."""
    generation.limits = GatewayLimits.model_validate(generation.limits.model_dump() | limits)
    return ListenerConfig("127.0.0.1", free_port(), keep_alive_s=0.3)


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that no mistake of a client fills the log."""
    with caplog.at_level(logging.WARNING):
        yield
    assert [record.getMessage() for record in caplog.records if "graceful shutdown" not in record.getMessage()] == []


def sentence(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"])


@pytest.mark.parametrize(
    "headers",
    [
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nLong: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 300 + b"\r\n",
        b"GET /health/live?" + b"x" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["long", "many", "url"],
)
def test_large_headers_are_refused(generation: Generation, headers: bytes) -> None:
    config = limited(generation, header_bytes=4096)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(headers)
            answer = await client.received()
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert sentence(answer) == "The headers must be at most 4096 bytes long, but are longer."

    run(test)


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nLong: ",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\n",
        b"GET /",
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nTrailer: ",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;extension=",
    ],
    ids=["value", "headers", "url", "empty lines", "trailer", "chunk extension"],
)
def test_headers_without_end_are_cut_off(generation: Generation, start: bytes) -> None:
    """Check that the server reads only a bounded part of headers, trailers and the like that never end."""
    config = limited(generation, header_bytes=4096)
    more = {b"GET /health/live HTTP/1.1\r\nHost: x\r\n": b"a: bcdefgh\r\n" * 100, b"": b"\r\n" * 600}.get(
        start, b"x" * 1200
    )

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(start)
            for _ in range(200):
                if client.is_closed:
                    break
                client.send(more)
                await asyncio.sleep(0.005)
            assert (await client.received()).startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))

    run(test)


def test_bytes_that_are_refused_for_two_reasons_get_one_answer(generation: Generation) -> None:
    """Check that a chunk's size that is neither a number nor short enough is refused only once."""
    config = limited(generation, header_bytes=4096)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.sleep(0.05)  # the size of the chunk must arrive alone
            client.send(b"z" * 5000)
            answer = await client.received()
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert answer.count(b"HTTP/1.1 ") == 1
            assert sentence(answer) == "The request is not valid HTTP/1.1."
            lines = generate_latest(generation.metrics.registry).decode().splitlines()
            counts = [line.split()[-1] for line in lines if line.startswith("expertmesh:request_refused_total{")]
            assert counts == ["1.0"]

    run(test)


@pytest.mark.parametrize(
    ("sent", "part"),
    [(b"GET /health/live HTTP/1.1\r\nHos", "headers"), (POST + BODY[:5], "body"), (POST, "body")],
)
def test_a_request_that_does_not_arrive_in_time_is_refused(generation: Generation, sent: bytes, part: str) -> None:
    config = limited(generation, header_s=0.3, body_s=0.3)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(sent)
            answer = await client.received()
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert sentence(answer) == f"The {part} of the request must arrive within 0.3 s, but did not."
            assert 'reason="timeout"} 1.0' in generate_latest(generation.metrics.registry).decode()

    run(test)


def test_bytes_that_trickle_in_do_not_extend_the_time(generation: Generation) -> None:
    config = limited(generation, header_s=0.5)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            num_sent = 0
            while not client.is_closed and num_sent < len(LIVE) - 2:
                client.send(LIVE[num_sent : num_sent + 1])
                num_sent += 1
                await asyncio.sleep(0.05)
            assert client.is_closed, "the server has waited for all bytes, which took 2 s"
            assert client.data.startswith(b"HTTP/1.1 408 ")

    run(test)


@pytest.mark.parametrize("sent", [b"", LIVE, LIVE + b"\r\n"], ids=["silent", "after an answer", "empty line"])
def test_idle_connections_are_closed(generation: Generation, sent: bytes) -> None:
    config = limited(generation, header_s=0.3)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(sent)
            assert (await client.received()).count(b"HTTP/1.1") == (LIVE in sent)

    run(test)


def test_a_new_connection_replaces_the_one_that_is_silent_longest(generation: Generation) -> None:
    config = limited(generation, connections=3, header_s=30)

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(listening(generation, config))
            half, silent, third, fourth = [await stack.enter_async_context(connect(config.http_port)) for _ in range(4)]
            assert (await half.received()).startswith(b"HTTP/1.1 503 ")
            silent.send(LIVE[:20])  # the connection is silent no longer than `third` from now on
            await asyncio.sleep(0.05)
            fifth = await stack.enter_async_context(connect(config.http_port))
            assert (await third.received()).startswith(b"HTTP/1.1 503 ")
            for client in (fourth, fifth):
                client.send(LIVE)
                assert await client.status() == 200
            silent.send(LIVE[20:])
            assert await silent.status() == 200

    run(test)


def test_answers_are_never_cut_off_to_make_room(generation: Generation, source: EchoSource) -> None:
    source.gate = asyncio.Event()
    config = limited(generation, connections=2, header_s=30)

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(listening(generation, config))
            busy = [await stack.enter_async_context(connect(config.http_port)) for _ in range(2)]
            for client in busy:
                client.send(POST + BODY)
            await until(lambda: len(source.active) == 2)
            late = await stack.enter_async_context(connect(config.http_port))
            answer = await late.received()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1\r\n" in answer.lower()
            assert sentence(answer) == "The server has 2 open connections and accepts no more; retry later."
            source.gate.set()
            assert [await client.status() for client in busy] == [200, 200]

    run(test)


def test_a_client_that_reads_nothing_is_dropped(generation: Generation, source: EchoSource) -> None:
    config = limited(generation, write_s=0.5)
    many = {"prompt": "hello", "ignore_eos": True, "stream": True, "max_tokens": 58, "n": 32, "logprobs": 20}
    body = json.dumps(many).encode()

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port, receive_buffer=4096) as client:
            client.transport.pause_reading()
            client.send(POST.replace(b"%d" % len(BODY), b"%d" % len(body)) + body)
            await until(lambda: 'reason="timeout"' in generate_latest(generation.metrics.registry).decode())
            await until(lambda: not source.active)

    run(test)


@pytest.mark.parametrize(
    "sent",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nX-Request-Id: a\x01b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(generation: Generation, sent: bytes) -> None:
    config = limited(generation)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(sent)
            answer = await client.received()
            assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ")), answer
            assert sentence(answer)

    run(test)


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_wish_for_another_protocol_is_ignored(generation: Generation, upgrade: bytes, is_chunked: bool) -> None:
    config = limited(generation)
    wish = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: " + upgrade + b"\r\nHTTP2-Settings: AAMAAABkAAQ"
    length = b"Content-Length: %d" % len(BODY)
    sent = POST.replace(b"\r\nHost: x", wish, 1) + BODY
    if is_chunked:
        sent = sent.replace(length, b"Transfer-Encoding: chunked").replace(
            BODY, b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        )

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            for part in (sent, sent[:-9], sent[-9:], LIVE.replace(b"\r\nHost: x", wish, 1) + LIVE):
                client.send(part)
                await asyncio.sleep(0.05)
            assert [await client.status() for _ in range(4)] == [200] * 4

    run(test)


def test_pipelined_requests_are_answered_in_order(generation: Generation) -> None:
    config = limited(generation)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send((POST + BODY + LIVE) * 3)
            assert [await client.status() for _ in range(6)] == [200] * 6
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(LIVE * (MAX_PIPELINED + 2))
            assert (await client.received()).startswith(b"HTTP/1.1 400 ")

    run(test)


def test_half_a_pipelined_request_does_not_end_the_answer_before_it(generation: Generation, source: EchoSource) -> None:
    source.pause = 0.3
    config = limited(generation, header_s=0.2)

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(POST + BODY + LIVE[:-5])
            answer = await client.received()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"HTTP/1.1") == 1

    run(test)


def test_a_client_that_leaves_frees_its_request_despite_a_pipelined_one(
    generation: Generation, source: EchoSource
) -> None:
    source.gate = asyncio.Event()  # is never set, so only the client's leaving ends the request
    config = limited(generation)
    body = b'{"prompt": "hello", "max_tokens": 50, "ignore_eos": true}'

    async def test() -> None:
        async with listening(generation, config):
            async with connect(config.http_port) as client:
                client.send(POST.replace(b"%d" % len(BODY), b"%d" % len(body)) + body + LIVE)
                await until(lambda: bool(source.active))
            await until(lambda: not source.active)

    run(test)


def test_garbage_after_a_request_does_not_enter_its_answer(generation: Generation, source: EchoSource) -> None:
    source.pause = 0.05
    config = limited(generation)
    body = b'{"prompt": "hello", "max_tokens": 20, "ignore_eos": true, "stream": true}'

    async def test() -> None:
        async with listening(generation, config), connect(config.http_port) as client:
            client.send(POST.replace(b"%d" % len(BODY), b"%d" % len(body)) + body)
            await client.until(lambda: b"data: " in client.data)
            client.send(b"\x00garbage\r\n\r\n")
            assert b"HTTP/1.1 400" not in await client.received()
            await until(lambda: not source.active)

    run(test)


def test_a_client_that_expects_100_continue_is_told_to_go_on_or_refused(generation: Generation) -> None:
    config = limited(generation)
    expecting = POST.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")

    async def test() -> None:
        async with listening(generation, config):
            async with connect(config.http_port) as client:
                client.send(expecting)
                assert await client.status() == 100
                client.send(BODY)
                assert await client.status() == 200
            async with connect(config.http_port) as client:
                client.send(expecting.replace(b"%d" % len(BODY), b"9999999"))
                assert await client.status() == 413

    run(test)


def test_the_server_is_live_while_clients_abuse_connections(generation: Generation) -> None:
    """Check that /health/live waits for none of hundreds of idle, half and stalled requests.

    Each of these requests may last longer than the test.
    """
    config = limited(generation, connections=600, header_s=600, body_s=600)
    kinds = (
        b"",
        LIVE[:-5],
        POST + BODY[:5],
        LIVE,
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    )

    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(listening(generation, config))
            clients: list[PlainConnection] = []
            for number in range(700):
                clients.append(await stack.enter_async_context(connect(config.http_port)))
                clients[-1].send(kinds[number % len(kinds)])
            async with httpx.AsyncClient() as http:
                for _ in range(20):
                    answer = await http.get(
                        f"http://127.0.0.1:{config.http_port}/health/live", headers={"Connection": "close"}
                    )
                    assert answer.status_code == 200

    run(test)
