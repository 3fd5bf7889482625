"""The tests run the load generator against a simple server that sends the requested number of stream events."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.load import Prompts, closed_loop, local_url, quantile, summarize
from benchmarks.load_overhead import serve
from benchmarks.server import free_port
from benchmarks.soak import Growth, growths
from benchmarks.throughput import decode_speed
from services.cli.drill.event_stream import parse
from services.cli.drill.load import RequestOutcome, ask, has_text, open_loop

GAP_S = 0.01


@asynccontextmanager
async def trivial_server() -> AsyncIterator[str]:
    port = free_port()
    serving = asyncio.create_task(serve(port))
    try:
        while True:
            try:
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        serving.cancel()


def test_every_event_of_every_stream_is_seen_when_it_comes() -> None:
    async def run() -> list[RequestOutcome]:
        async with trivial_server() as url:
            bodies = [{"max_tokens": count, "temperature": GAP_S} for count in (1, 5, 20)]
            return await closed_loop(url, bodies, concurrency=2, seconds=60)

    outcomes = sorted(asyncio.run(run()), key=lambda outcome: outcome.num_generated)
    assert [len(outcome.event_times) for outcome in outcomes] == [1, 5, 20]
    assert [outcome.num_generated for outcome in outcomes] == [1, 5, 20]
    assert all(outcome.ttft_s >= GAP_S for outcome in outcomes)
    assert quantile(outcomes[2].gaps_s, 0.5) > GAP_S / 2  # the gaps are 0 if events are kept until the stream ends
    summary = summarize(outcomes)
    assert (summary["num_good"], summary["errors"], summary["tokens"]["generated"]) == (3, {}, 26)


def test_open_loop_sends_at_its_own_times_whatever_the_server_does() -> None:
    async def run() -> list[RequestOutcome]:
        async with trivial_server() as url:
            bodies = [{"max_tokens": 1, "temperature": 0.5}] * 10
            return await open_loop(url, bodies, rate=200, seconds=60, seed=1)

    outcomes = asyncio.run(run())
    assert len(outcomes) == 10
    # The generator sent each request without waiting for another.
    assert max(outcome.sent_at for outcome in outcomes) < min(outcome.ended_at for outcome in outcomes)


def test_a_server_that_is_not_there_is_an_error_of_that_request() -> None:
    outcome = asyncio.run(ask(f"http://127.0.0.1:{free_port()}/v1/completions", {}, 0.0))
    assert outcome.error == "ConnectionRefusedError"


def test_an_answer_cut_short_is_no_answer() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole = head + b"5\r\nab\n\nc\r\n0\r\n\r\n"
    assert parse([(1.0, whole)]).body == b"ab\n\nc"
    for end in range(len(whole) - 5):  # the answer ends at any position before the last chunk
        with pytest.raises(ConnectionError):
            parse([(1.0, whole[:end])])


def test_an_event_came_with_its_last_byte() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    first, second = b"c\r\ndata: {}\n\nda\r\n", b"a\r\nta: {1}\n\n:\r\n0\r\n\r\n"
    events = list(parse([(1.0, head + first), (2.0, second)]).events())
    assert [(event.data, event.came_at) for event in events] == [(b"{}", 1.0), (b"{1}", 2.0)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"choices":[{"text":"a","index":0}]}', True),
        (b'{"choices":[{"text":"","finish_reason":"length"}]}', False),
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', False),
        (b'{"choices":[{"delta":{},"finish_reason":"stop"}]}', False),
        (b'{"choices":[{"delta":{"content":"a"}}]}', True),
        (b"[DONE]", False),
    ],
)
def test_only_text_counts(data: bytes, expected: bool) -> None:
    assert has_text(data) is expected


def test_only_this_machine_is_loaded() -> None:
    assert local_url("http://127.0.0.1:80/") == "http://127.0.0.1:80"
    with pytest.raises(ValueError, match=r"--url must be http://127\.0\.0\.1"):
        local_url("http://192.0.2.1:80")


def test_prompts_repeat_with_the_seed() -> None:
    def first(seed: int, vocab_size: int) -> list[object]:
        return list(itertools.islice(Prompts((3, 9), (4,), vocab_size, seed).bodies(), 5))

    assert first(1, 100) == first(1, 100) != first(2, 100)
    assert first(1, 0) == first(1, 0)
    assert all(16 <= token < 100 for body in first(1, 100) for token in body["prompt"])  # type: ignore[index]


def test_decoding_is_measured_while_all_streams_decode() -> None:
    late = RequestOutcome(0.0, 9.0, event_times=(4.0, 5.0, 6.0), num_generated=3)
    # each event of this stream has two tokens
    early = RequestOutcome(0.0, 9.0, event_times=(1.0, 2.0, 3.0, 4.5, 5.5, 7.0), num_generated=12)
    assert decode_speed([late, early]) == pytest.approx((2 * 1 + 2 * 2) / 2.0)


def test_a_process_that_grows_is_told_from_one_that_does_not() -> None:
    mib = 1 << 20
    samples = [{1: 100 * mib + i * mib, 2: 100 * mib + (i % 2) * mib, 3: 0 if i == 59 else mib} for i in range(60)]
    by_process = {one.process: one for one in growths(samples, {1: "leaks", 2: "flat"})}
    assert set(by_process) == {"leaks (1)", "flat (2)"}  # the third process ended before the last sample
    assert not by_process["leaks (1)"].is_flat
    assert by_process["flat (2)"].is_flat
    assert Growth("small", 1.0, 1.0 + (16 << 20)).is_flat
