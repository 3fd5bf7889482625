"""A `LoadOrder` says what a shard should load, and a `LoadResult` says what a shard has loaded.

The module also converts these objects to messages and back. `control_client` sends a `LoadOrder` and receives a
`LoadResult`; the shard's servicer does the reverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.topology import Experts
from protos.expertmesh.expert.v1 import expert_pb2 as pb

Key = tuple[int, int]  # the layer of an expert and its id within the layer
ExpertsByLayer = dict[int, list[int]]  # expert ids by layer


def keys_of(experts: Experts) -> set[Key]:
    """Return the keys of the experts in `experts`, which contains expert ids by layer."""
    return {(layer, expert) for layer, ids in experts.items() for expert in ids}


def group_by_layer(keys: Iterable[Key]) -> ExpertsByLayer:
    """Return the experts of `keys` by layer, both layers and expert ids in ascending order."""
    experts: ExpertsByLayer = {}
    for layer, expert in sorted(keys):
        experts.setdefault(layer, []).append(expert)
    return experts


def experts_to_proto(experts: Experts) -> list[pb.LayerExperts]:
    """Return one `LayerExperts` message for each layer of `experts`."""
    return [pb.LayerExperts(layer=layer, experts=list(ids)) for layer, ids in experts.items()]


def experts_from_proto(messages: Iterable[pb.LayerExperts]) -> ExpertsByLayer:
    """Return the experts of `messages` by layer; the experts of several messages for one layer are joined."""
    experts: ExpertsByLayer = {}
    for message in messages:
        experts.setdefault(message.layer, []).extend(message.experts)
    return experts


def checksums_to_proto(checksums: Mapping[Key, int]) -> list[pb.LayerChecksums]:
    """Return one `LayerChecksums` message for each layer of `checksums`."""
    messages: dict[int, pb.LayerChecksums] = {}
    for (layer, expert), checksum in checksums.items():
        message = messages.setdefault(layer, pb.LayerChecksums(layer=layer))
        message.experts.append(expert)
        message.checksums.append(checksum)
    return list(messages.values())


def checksums_from_proto(messages: Iterable[pb.LayerChecksums]) -> dict[Key, int]:
    """Return the checksums of `messages` by expert; raise ValueError if a message lacks the checksum of an expert."""
    return {
        (message.layer, expert): checksum
        for message in messages
        for expert, checksum in zip(message.experts, message.checksums, strict=True)
    }


@dataclass(frozen=True)
class Sources:
    """`Sources` say where a shard gets the weights of experts, and which checksums the weights must have."""

    peers: Mapping[Key, str] = field(default_factory=dict)  # endpoint of the shard that is asked before the checkpoint
    expected: Mapping[Key, int] = field(default_factory=dict)  # checksum that the weights must have


@dataclass(frozen=True)
class LoadOrder:
    """A `LoadOrder` names the experts for which a shard becomes home or standby, and where to get the weights."""

    homes: Experts
    standby: Experts
    sources: Sources = Sources()

    def to_proto(self, epoch: int, fencing: int) -> pb.LoadRequest:
        """Return the order as a message with the leader's fencing token and the leader's placement epoch."""
        by_peer: dict[str, list[Key]] = {}
        for key, endpoint in self.sources.peers.items():
            by_peer.setdefault(endpoint, []).append(key)
        peers = [
            pb.Peer(endpoint=endpoint, experts=experts_to_proto(group_by_layer(keys)))
            for endpoint, keys in by_peer.items()
        ]
        return pb.LoadRequest(
            experts=experts_to_proto(self.homes),
            epoch=epoch,
            standby=experts_to_proto(self.standby),
            peers=peers,
            expected=checksums_to_proto(self.sources.expected),
            fencing=fencing,
        )

    @classmethod
    def from_proto(cls, request: pb.LoadRequest) -> LoadOrder:
        """Return the order that `request` contains; raise ValueError if `request` lacks the checksum of an expert."""
        peers = {key: peer.endpoint for peer in request.peers for key in keys_of(experts_from_proto(peer.experts))}
        sources = Sources(peers, checksums_from_proto(request.expected))
        return cls(experts_from_proto(request.experts), experts_from_proto(request.standby), sources)


@dataclass(frozen=True)
class LoadResult:
    """A `LoadResult` says what a shard has loaded, after a load that has succeeded."""

    gains: dict[int, int]  # largest gain exponent of all held experts, for each layer of the order
    checksums: dict[int, dict[int, int]]  # checksums of the experts of the order, by layer and expert
    used_bytes: int  # bytes of device memory in use after the load
    memory_budget: int  # bytes of device memory that the shard may use

    def to_proto(self) -> pb.LoadReply:
        """Return the result as a message, with the gains in ascending order of the layers."""
        checksums = {
            (layer, e): checksum for layer, by_expert in self.checksums.items() for e, checksum in by_expert.items()
        }
        return pb.LoadReply(
            gains=[pb.LayerGain(layer=layer, exponent=gain) for layer, gain in sorted(self.gains.items())],
            used_bytes=self.used_bytes,
            memory_budget=self.memory_budget,
            checksums=checksums_to_proto(checksums),
        )

    @classmethod
    def from_proto(cls, reply: pb.LoadReply) -> LoadResult:
        """Return the result that `reply` contains."""
        checksums: dict[int, dict[int, int]] = {}
        for (layer, expert), checksum in checksums_from_proto(reply.checksums).items():
            checksums.setdefault(layer, {})[expert] = checksum
        gains = {gain.layer: gain.exponent for gain in reply.gains}
        return cls(gains, checksums, reply.used_bytes, reply.memory_budget)
