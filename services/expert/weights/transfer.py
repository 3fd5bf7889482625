"""`WeightSource` gets experts' weights from a peer or the checkpoint, and `send` sends weights to a peer.

The weights that a peer sends are verified against the checksum that the peer states. If the caller passes the checksum
from the manifest, all weights are verified against this checksum, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import torch

from model.configs.expert_shape import ExpertShape
from model.stored_matrix import StoredMatrix
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from protos.options import CHANNEL_OPTIONS
from services.expert.weights.host import ExpertHost
from services.expert.weights.load_order import Key, Sources
from services.expert.weights.weights import ExpertMetadata, Weights, matrix_formats
from services.low_priority import run_in_thread

MAX_TRANSFER_BYTES = 64 << 20  # maximum bytes of experts in flight from a shard; same limit for experts to a shard
FETCH_STALL_S = 2.0  # seconds without a message after which the fetch from a peer fails

ReadExpert = Callable[[int, int], Mapping[str, StoredMatrix]]  # (layer, expert) -> matrices by name
WeightsOf = Callable[[int], Awaitable[tuple[Weights, ExpertMetadata]]]  # the argument is an expert id within one layer


class PeerError(RuntimeError):
    """A `PeerError` says that a peer did not send the requested expert, and why."""


class ByteBudget:
    """A `ByteBudget` limits the bytes that are in flight at the same time; transfers wait in the order of arrival.

    A transfer with more bytes than the limit runs alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used_bytes = max_bytes, 0
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait until `num_bytes` more bytes fit, and reserve these bytes until the `async with` block ends."""
        num_bytes = min(num_bytes, self.max_bytes)
        async with self._turn:
            while self.used_bytes + num_bytes > self.max_bytes:
                self._freed.clear()
                await self._freed.wait()
            self.used_bytes += num_bytes
        try:
            yield
        finally:
            self.used_bytes -= num_bytes
            self._freed.set()


class PeerChannels:
    """`PeerChannels` connect to peers for the duration of one load; a peer that failed once is not asked again."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.failed: set[str] = set()

    def __getitem__(self, endpoint: str) -> grpc.aio.Channel:
        if endpoint not in self._channels:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        return self._channels[endpoint]

    async def __aenter__(self) -> PeerChannels:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.values():
            await channel.close()


class WeightSource:
    """A `WeightSource` gets the weights of a shard's experts for a load, for a promotion, or for a peer."""

    def __init__(self, host: ExpertHost, read: ReadExpert) -> None:
        self.host, self.read = host, read
        self.incoming = ByteBudget(MAX_TRANSFER_BYTES)

    async def obtain(
        self, key: Key, sources: Sources, peers: PeerChannels, *, checkpoint_first: bool = False
    ) -> Weights:
        """Return the verified weights of the expert `key`, from the peer that `sources` names or from the checkpoint.

        The peer is tried first; if `checkpoint_first` is true, the checkpoint is tried first. If the peer and the
        checkpoint fail, raise ValueError with the expert and the two reasons.
        """
        endpoint, expected, problems = sources.peers.get(key, ""), sources.expected.get(key), []
        ways: list[tuple[str, Callable[[], Awaitable[Weights]]]] = [
            ("the checkpoint", lambda: run_in_thread(self.read_checkpoint, key, expected))
        ]
        if endpoint and endpoint not in peers.failed:
            from_peer = (f"the peer {endpoint}", lambda: self._from_peer(key, endpoint, peers, expected))
            ways = [*ways, from_peer] if checkpoint_first else [from_peer, *ways]
        for where, way in ways:
            try:
                return await way()
            except (ValueError, OSError, PeerError) as error:
                problems.append(f"from {where}: {error}")
        raise ValueError(f"Expert {key[1]} of layer {key[0]} was not loaded {'; '.join(problems)}.")

    async def _from_peer(self, key: Key, endpoint: str, peers: PeerChannels, expected: int | None) -> Weights:
        (layer, expert), host = key, self.host
        async with self.incoming.hold(host.stored_bytes(key)):
            try:
                weights = await fetch(peers[endpoint], host.shapes[layer], expert, host.dtype)
                check_expected(weights, expected)
                return weights
            except (PeerError, ValueError):
                peers.failed.add(endpoint)
                raise

    def read_checkpoint(self, key: Key, expected: int | None) -> Weights:
        """Return an expert's weights from the checkpoint; if `expected` is given, verify the weights' checksum.

        Reading and hashing take long, so the event loop's thread should not call this method. Raise ValueError if a
        tensor is missing or the checksum differs.
        """
        weights = Weights.of(self.read(*key), self.host.dtype)
        check_expected(weights, expected)
        return weights

    async def current(self, key: Key) -> tuple[Weights, ExpertMetadata] | None:
        """Return the weights and the metadata of an expert, or None if this shard does not hold the expert.

        The weights come from host memory, else from the device, else from the checkpoint.
        """
        host, metadata = self.host, self.host.metadata(key)
        if metadata is None:
            return None
        standby = host.standbys.get(key)
        if standby is not None and (weights := standby.weights) is not None:
            return weights, metadata
        with suppress(KeyError):
            return await self.from_device(key), metadata
        return await run_in_thread(self.read_checkpoint, key, metadata.checksum), metadata

    async def from_device(self, key: Key) -> Weights:
        """Return the weights of an expert on the device; raise KeyError if the expert is not on the device."""
        layer, expert = key
        return Weights.of(await run_in_thread(self.host.on_device.banks[layer].matrices, expert), self.host.dtype)


def check_expected(weights: Weights, expected: int | None) -> None:
    """Raise ValueError if `expected` is given and the checksum of `weights` differs from `expected`.

    The checksum is computed and cached even if `expected` is None.
    """
    checksum = weights.checksum
    if expected not in (None, checksum):
        numbers = f"the checksum {checksum:016x}, but {expected:016x} was expected"
        raise ValueError(f"it has {numbers}: its bytes are damaged or another checkpoint's")


async def send(
    experts: Iterable[int], num_bytes: int, weights_of: WeightsOf, out: ByteBudget
) -> AsyncIterator[pb.FetchChunk]:
    """Yield the chunks of `experts`; each expert has `num_bytes` bytes, and `out` limits the bytes in flight."""
    for expert in experts:
        async with out.hold(num_bytes):
            weights, metadata = await weights_of(expert)
            left = weights.nbytes
            for view in weights.chunks():
                left -= len(view)
                chunk = pb.FetchChunk(expert=expert, data=view.tobytes())
                if left == 0:
                    chunk.is_last, chunk.checksum, chunk.gain_exponent = True, metadata.checksum, metadata.gain
                    chunk.seal = metadata.seal
                yield chunk


async def fetch(channel: grpc.aio.Channel, shape: ExpertShape, expert: int, dtype: torch.dtype) -> Weights:
    """Return the weights of one expert from a peer, verified against the checksum that the peer states.

    Raise PeerError if the peer fails, sends nothing for FETCH_STALL_S seconds, or sends something other than the
    requested expert.
    """
    request = pb.FetchRequest(layer=shape.layer, experts=[expert], matrices=matrix_formats(shape, dtype))
    call: Any = expert_pb2_grpc.ExpertStub(channel).Fetch(request)  # type: ignore[no-untyped-call]
    try:
        return await _receive(call, shape, expert, dtype)
    except grpc.aio.AioRpcError as error:
        raise PeerError(f"it answered {error.code().name}: {error.details()}") from None
    except TimeoutError:
        raise PeerError(f"it sent nothing for {FETCH_STALL_S} s") from None
    finally:
        call.cancel()


async def _receive(call: Any, shape: ExpertShape, expert: int, dtype: torch.dtype) -> Weights:
    data, end = bytearray(shape.nbytes(dtype)), 0
    while (chunk := await asyncio.wait_for(call.read(), FETCH_STALL_S)) is not grpc.aio.EOF:
        piece = chunk.data
        if chunk.expert != expert or end + len(piece) > len(data):
            raise PeerError(f"it sent {len(piece)} bytes of expert {chunk.expert} that were not requested")
        data[end : end + len(piece)] = piece
        end += len(piece)
        if chunk.is_last:
            return await run_in_thread(_verified, data, end, shape, dtype, chunk)
    raise PeerError(f"it ended after {end} of {len(data)} bytes")


def _verified(data: bytearray, end: int, shape: ExpertShape, dtype: torch.dtype, last: pb.FetchChunk) -> Weights:
    """Return the received weights; raise PeerError if their size, checksum or metadata is wrong."""
    if end != len(data):
        raise PeerError(f"it sent {end} bytes, but the expert has {len(data)}")
    weights = Weights.from_bytes(data, shape, dtype, last.gain_exponent)
    if weights.checksum != last.checksum:
        raise PeerError(f"its bytes have the checksum {weights.checksum:016x}, but it stated {last.checksum:016x}")
    if last.seal != ExpertMetadata(last.checksum, last.gain_exponent).seal:
        raise PeerError(f"the gain exponent {last.gain_exponent} that it stated is damaged")
    return weights
