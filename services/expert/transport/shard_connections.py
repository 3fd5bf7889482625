"""`ShardConnections` keeps a stream and a `ShardHealth` for each incarnation of a shard that a client calls.

`update` belongs to the thread that follows the placement. The calling thread adopts an update at the start of its next
call, or while it waits.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable
from functools import partial

from cluster.dispatch.fleet_view import FleetView, ShardFleet
from cluster.dispatch.shard_health import LinkState, ShardHealth
from cluster.topology import Placement, Shard
from services.expert.transport.shard_stream import Receiver, ShardStream

log = logging.getLogger(__name__)

StreamKey = tuple[str, str, str]  # shard id, incarnation, endpoint


class ShardConnections:
    """`ShardConnections` holds the newest view of the fleet, and a stream and a `ShardHealth` for each incarnation.

    Streams that the newest placement does not need are closed after the timeout of a call, because earlier calls may
    still wait for their replies.
    """

    def __init__(self, fleet: ShardFleet, receiver: Receiver) -> None:
        self.view: FleetView | None = None  # the newest view, which the calling thread may not have adopted yet
        self.stream_of: dict[ShardHealth, ShardStream] = {}  # includes streams that are closing
        self.last_change = 0  # sequence number of the last change that matters to waiting calls
        self.is_given_up = False
        self.is_on_this_machine = False  # whether a shard runs on this machine and shares its cores
        self._fleet, self._receiver = fleet, receiver
        self._connected: dict[StreamKey, tuple[ShardHealth, ShardStream]] = {}
        self._closing: deque[tuple[float, ShardHealth, ShardStream]] = deque()  # closing time, health, stream
        self._change_numbers = itertools.count(1)

    @property
    def streams(self) -> list[ShardStream]:
        """Return the streams of the newest view, including streams without a connection."""
        return [stream for _, stream in self._connected.values()]

    def update(self, placement: Placement, shards: Iterable[Shard]) -> None:
        """Follow `placement` from now on: open streams to its shards now, and close streams to other shards later.

        A placement older than the current placement comes from a Redis that lost its data. Such a placement is ignored,
        but `shards` are still used.
        """
        previous = self.view
        if previous and placement.epoch < previous.placement.epoch:
            log.warning(
                "Placement epoch %d is ignored, because it is older than %d.", placement.epoch, previous.placement.epoch
            )
            placement = previous.placement
        known = {shard.id: shard for shard in shards}
        keys = {id: _stream_key(known[id]) for id in placement.shard_ids if id in known}
        for id, key in keys.items():
            if key not in self._connected:
                self._connect(key, known[id])
        self.is_on_this_machine = any(endpoint.startswith("127.") for _, _, endpoint in keys.values())
        healths = {id: self._connected[key][0] for id, key in keys.items()}
        cost_models = {id: known[id].cost_model for id in keys}
        draining = [id for id, shard in known.items() if shard.draining]
        self.view = view = FleetView(placement, healths, cost_models, draining, previous)
        if previous is None or not view.is_like(previous):
            self.last_change = next(self._change_numbers)
        self._close_later(self._connected.keys() - set(keys.values()))
        self._receiver.wake()

    def adopt_newest(self, now: float) -> None:
        """Let the calling thread use the newest view for everything that it sends from now on."""
        view = self.view
        if view is not None and view is not self._fleet.view:
            self._fleet.adopt(view, now)

    def reset_streams(self) -> None:
        """Reset the streams for which the fleet has requested a reset."""
        for health in self._fleet.take_resets():
            if stream := self.stream_of.get(health):
                stream.reset()

    def give_up(self) -> None:
        """Make waiting calls and all later calls fail instead of waiting for a home; any thread may call `give_up`."""
        self.is_given_up = True
        self._receiver.wake()

    def close(self) -> None:
        """Close every stream; the requests in flight are lost."""
        streams = [*self.streams, *(stream for _, _, stream in self._closing)]
        for stream in streams:
            stream.close()
        for stream in streams:
            stream.join()

    def _connect(self, key: StreamKey, shard: Shard) -> None:
        health = ShardHealth(shard.id, self._fleet.policy, shard.cost_model)
        _, _, endpoint = key
        stream = ShardStream(endpoint, self._receiver, partial(self._note_link, health))
        self._connected[key], self.stream_of[health] = (health, stream), stream

    def _note_link(self, health: ShardHealth, link: LinkState) -> None:
        health.link = link
        self._fleet.is_changed = True
        self.last_change = next(self._change_numbers)

    def _close_later(self, keys: set[StreamKey]) -> None:
        now = time.monotonic()
        for key in keys:
            self._closing.append((now + self._fleet.policy.timeout_s, *self._connected.pop(key)))
        while self._closing and self._closing[0][0] <= now:
            _, health, stream = self._closing.popleft()
            del self.stream_of[health]
            stream.close()


def _stream_key(shard: Shard) -> StreamKey:
    return shard.id, shard.incarnation, shard.compute_endpoint or shard.endpoint
