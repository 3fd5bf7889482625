"""These tests break a stream to a shard while two threads use it."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from cluster.dispatch.shard_health import LinkState
from model.family import ModelFamily
from services.expert.transport.shard_stream import Receiver, ShardStream, _Connection
from tests.services.expert.serving import run, serving


def test_a_connection_that_breaks_while_it_is_given_up_is_closed_after_that(
    family: ModelFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = Receiver()
    remove = receiver.remove

    def break_first(connection: _Connection) -> None:
        connection.socket.tcp_socket.shutdown(socket.SHUT_RDWR)  # the stream's thread notices the shutdown
        time.sleep(0.3)
        remove(connection)

    monkeypatch.setattr(receiver, "remove", break_first)

    async def test() -> None:
        async with serving(family) as shard:
            heard: list[LinkState] = []
            stream = ShardStream(shard.compute_endpoint, receiver, heard.append)
            while LinkState.UP not in heard:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(stream.reset)  # an earlier version raised a KeyError here
            assert LinkState.DOWN in heard
            while heard[-1] is not LinkState.UP:  # wait until the stream has a new connection
                await asyncio.sleep(0.01)
            stream.close()
            await asyncio.to_thread(stream.join)

    run(test)
    receiver.close()
