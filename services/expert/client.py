"""`RemoteExperts` computes a layer's routed experts on the shards that hold these experts.

A call passes through these objects: `RemoteExperts` -> `ExpertCall` (messages and sums) -> `LayerCall` (decisions) ->
`InFlightTable` -> `ShardStream` -> socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from cluster.dispatch.call_policy import CallPolicy, Traffic
from cluster.dispatch.fleet_view import ShardFleet
from cluster.dispatch.layer_call import warm_up as warm_up_routing
from cluster.dispatch.shard_health import LinkState
from cluster.topology import Placement, Shard
from model.cpu.thread_pool import THREAD_POOL
from services.expert.expert_call import ExpertCall
from services.expert.in_flight import InFlightTable
from services.expert.transport.dispatch_combine import warm_up
from services.expert.transport.shard_connections import ShardConnections
from services.expert.transport.shard_stream import Receiver


class RemoteExperts:
    """`RemoteExperts` implements `model.blocks.moe.Experts` with the shards of the newest placement given to `update`.

    The class never asks Redis. Calls must come from one thread, on which several calls may be in progress at the same
    time. Updates must also come from one thread, but this thread may differ from the thread of the calls. Calls in
    progress go on after an update; picks that are sent again follow the new placement.

    policy: the limits of a call.
    expert_mib: the size of one expert in MiB, by layer.
    """

    def __init__(self, policy: CallPolicy | None = None, expert_mib: Mapping[int, float] | None = None) -> None:
        self.policy = policy or CallPolicy()
        self._fleet = ShardFleet(self.policy, expert_mib)
        self._receiver = Receiver()
        self.connections = ShardConnections(self._fleet, self._receiver)
        self._in_flight = InFlightTable(self._fleet, self.connections, self._receiver)
        warm_up()
        warm_up_routing()

    @property
    def traffic(self) -> Traffic:
        return self._fleet.traffic

    @property
    def circuits(self) -> dict[str, str]:
        """Return the circuit of each shard of the placement, by shard id: "closed", "open" or "half-open"."""
        return {id: circuit.value for id, circuit in self._fleet.circuits(time.monotonic()).items()}

    @property
    def epoch(self) -> int:
        """Return the epoch of the placement in use, or 0 before the first `update`."""
        view = self.connections.view
        return view.placement.epoch if view else 0

    @property
    def down(self) -> frozenset[str]:
        """Return the ids of the shards of the placement that cannot be reached now."""
        view = self.connections.view
        if view is None:
            return frozenset()
        return frozenset(
            id for id in view.shard_ids if (health := view.healths.get(id)) is None or health.link is LinkState.DOWN
        )

    def update(self, placement: Placement, shards: Iterable[Shard]) -> None:
        """Use `placement` for calls that start from now on, open streams to new shards, and close unneeded streams.

        If `placement` is older than the current placement, `placement` is ignored, but `shards` are still used.
        """
        self.connections.update(placement, shards)

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        """Send the rows to the shards and return a function that waits for the weighted sums, fp32 (N, L).

        x_NL: N rows of L numbers, bf16 or fp32.
        topk_ids_NK, topk_weights_NK: the ids of the K experts of each row, and the weights of these experts.

        The returned function raises ExpertsUnavailable if some picks cannot be computed. `__call__` itself raises
        ValueError for rows that are neither bf16 nor fp32.
        """
        if self.connections.is_on_this_machine:
            THREAD_POOL.pause()  # leaves the cores to the shards on this machine
        try:
            call = ExpertCall(self._fleet, self.connections, self._in_flight, layer, x_NL, topk_ids_NK, topk_weights_NK)
        except BaseException:
            THREAD_POOL.resume()
            raise
        return call.wait

    def close(self) -> None:
        """Close every stream, so that calls in progress fail."""
        self.give_up()
        self.connections.close()
        self._receiver.close()

    def give_up(self) -> None:
        """Make waiting calls and all later calls fail instead of waiting for a home; any thread may call `give_up`."""
        self.connections.give_up()
