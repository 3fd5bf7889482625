"""`CorruptingProxy` is a TCP proxy that changes random bytes; a seed determines which bytes it changes."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from typing import Self


class CorruptingProxy:
    """A `CorruptingProxy` forwards connections to the shard at `endpoint` and flips a bit in random bytes.

    - `to_client`: if 10,000, the proxy changes on average one of 10,000 bytes that go to the client; if 0, no byte
    - `to_shard`: if 10,000, the proxy changes on average one of 10,000 bytes that go to the shard; if 0, no byte
    """

    def __init__(self, endpoint: str, to_client: int = 0, to_shard: int = 0, seed: int = 0) -> None:
        host, _, port = endpoint.rpartition(":")
        self._target = host, int(port)
        self._one_in = {"client": to_client, "shard": to_shard}
        self._chance = random.Random(seed)
        self.num_changed = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listening, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                shard = socket.create_connection(self._target)
                self._open += [client, shard]
                for ends in ((client, shard, "shard"), (shard, client, "client")):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, to: str) -> None:
        one_in, num_passed = self._one_in[to], 0
        with suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                for place in range(len(data)):
                    # The first 200 bytes do not change, because another test checks connections that never come up.
                    if one_in and num_passed + place > 200 and self._chance.randrange(one_in) == 0:
                        data[place] ^= 1 << self._chance.randrange(8)
                        self.num_changed += 1
                num_passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
