"""`ExpertHost` holds the experts of one shard, as homes and as standbys, and computes requests with them.

This module uses no network, files or clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.topology import Experts, held_digest
from model.blocks.expert_bank import memory_on
from model.configs.expert_shape import ExpertShape
from model.exact_sums import log_wide_spread
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.dispatch_combine import warm_up
from services.expert.transport.wire import TORCH_DTYPES, Picks, Refused, checked_body, picks_from_proto, sums_to_proto
from services.expert.weights.device_experts import DeviceExperts
from services.expert.weights.load_order import ExpertsByLayer, Key, group_by_layer, keys_of
from services.expert.weights.standbys import StandbyStore
from services.expert.weights.weights import ExpertMetadata, Weights


@dataclass
class PendingRequest:
    """A `PendingRequest` is a partly computed request: some of the request's experts must first be promoted.

    Legend: N rows, L expert input dim, P picks.
    """

    layer: int
    picks: Picks
    sums_NL: NDArray[np.int64]  # the sums over the picks that are computed already
    is_pending_P: NDArray[np.bool_]  # the picks that are still to be computed

    @property
    def experts(self) -> list[int]:
        """Return the experts that must be promoted before the rest of the request can be computed."""
        return [int(expert) for expert in np.unique(self.picks.expert_P[self.is_pending_P])]

    def advance(self, on_device: DeviceExperts) -> pb.Sums:
        """Compute the pending picks whose experts are on the device, and return the sums if no pick is left.

        Raise NeedsPromotion if some picks are left.
        """
        is_next_P = self.is_pending_P & on_device.are_ready(self.layer, self.picks.expert_P)
        if is_next_P.any():
            self.sums_NL += on_device.partial_sums(self.layer, self.picks.only(is_next_P))
            self.is_pending_P &= ~is_next_P
        if self.is_pending_P.any():
            raise NeedsPromotion(self)
        return sums_to_proto(self.sums_NL)


class NeedsPromotion(Exception):
    """A `NeedsPromotion` error says that standbys must be promoted before the rest of `pending` can be computed."""

    def __init__(self, pending: PendingRequest) -> None:
        super().__init__(f"Experts {pending.experts} of layer {pending.layer} are standbys here.")
        self.pending = pending


@dataclass
class StagedExperts:
    """`StagedExperts` hold the metadata and the standbys that a load has prepared for `ExpertHost.commit`."""

    metadata: dict[Key, ExpertMetadata] = field(default_factory=dict)  # checksum and gain exponent of each new expert
    standbys: dict[Key, tuple[Weights | None, str]] = field(default_factory=dict)  # copy in host memory, source peer


class ExpertHost:
    """An `ExpertHost` holds the experts of one shard, within one budget for device memory and one for host memory.

    A host starts empty. For some experts the shard is a home, and these experts are on the device. Other experts, for
    which the shard is a standby, are in host memory or on disk, and are promoted to the device when a request needs
    them. A promoted expert is evicted when its memory is needed for an expert whose home is here.

    The worker's thread, which also computes, makes all changes; only `fill_device` may run on any thread. Reading is
    safe on any thread.
    """

    def __init__(
        self,
        shapes: Iterable[ExpertShape],
        dtype: torch.dtype,
        device: torch.device,
        memory_budget: int,
        host_budget: int = 0,
    ) -> None:
        warm_up()
        self.shapes = {shape.layer: shape for shape in shapes}
        self.dtype, self.device, self.memory_budget = dtype, device, memory_budget
        self._memory = memory_on(self.shapes.values(), dtype, device)
        self.standbys = StandbyStore(host_budget, is_pinned=device.type == "cuda")
        self.on_device = DeviceExperts(self.shapes, dtype, device, memory_budget, self.standbys)
        self.epoch = 0
        self._is_home = {layer: np.zeros(shape.num_experts, dtype=np.bool_) for layer, shape in self.shapes.items()}
        self._metadata: dict[Key, ExpertMetadata] = {}
        # By layer: how many experts in `_metadata` have each gain exponent.
        self._gain_counts: dict[int, Counter[int]] = {layer: Counter() for layer in self.shapes}
        self._logged_layers: set[int] = set()  # layers whose gain exponents have been logged as far apart

    # Held experts ----------------------------------------------------------------------------------------------------

    @property
    def held(self) -> ExpertsByLayer:
        """Return the ids of the experts whose home is this shard, by layer; a layer without experts is left out."""
        held = {layer: is_home.nonzero()[0].tolist() for layer, is_home in self._is_home.items()}
        return {layer: experts for layer, experts in held.items() if experts}

    @property
    def standby(self) -> ExpertsByLayer:
        """Return the experts for which this shard is a standby, by layer, including promoted experts."""
        return group_by_layer(self.standbys.keys)

    @property
    def promoted(self) -> ExpertsByLayer:
        """Return the standbys that are currently promoted to the device, by layer."""
        return group_by_layer(self.on_device.promoted.copy())

    @property
    def num_held(self) -> int:
        return sum(int(is_home.sum()) for is_home in self._is_home.values())

    @property
    def held_bytes(self) -> int:
        """Return the bytes of device memory that all experts whose home is this shard take."""
        return sum(int(self._is_home[layer].sum()) * memory.device for layer, memory in self._memory.items())

    @property
    def used_bytes(self) -> int:
        """Return the bytes of device memory in use, including experts that are promoted or still being loaded."""
        return self.on_device.used_bytes

    @property
    def digest(self) -> str:
        return held_digest(self.held, self.standby)

    def is_home(self, key: Key) -> bool:
        layer, expert = key
        return bool(self._is_home[layer][expert])

    def stored_bytes(self, key: Key) -> int:
        """Return the bytes of an expert's weights as they are stored and sent to other shards."""
        layer, _ = key
        return self.shapes[layer].nbytes(self.dtype)

    def standby_bytes(self, key: Key) -> int:
        """Return the bytes of host memory that an expert takes as a standby."""
        layer, _ = key
        return self._memory[layer].host

    def metadata(self, key: Key) -> ExpertMetadata | None:
        """Return the checksum and the gain exponent of an expert, or None if this shard does not hold the expert."""
        return self._metadata.get(key)

    def checksums(self, keys: Iterable[Key]) -> dict[int, dict[int, int]]:
        """Return the checksums of the experts of `keys` that this shard holds, by layer and expert, ascending."""
        checksums: dict[int, dict[int, int]] = {}
        for layer, expert in sorted(keys):
            if (metadata := self.metadata((layer, expert))) is not None:
                checksums.setdefault(layer, {})[expert] = metadata.checksum
        return checksums

    def gains(self, layers: Iterable[int]) -> dict[int, int]:
        """Return for each of `layers` the largest gain exponent of the experts that this shard holds.

        A layer without such experts is left out.
        """
        # The worker's thread may change a Counter while another thread iterates over it, so each one is copied first.
        return {layer: max(exponents) for layer in layers if (exponents := list(self._gain_counts[layer]))}

    # Changes ---------------------------------------------------------------------------------------------------------

    def check_fits(self, homes: Experts, standby: Experts) -> None:
        """Raise ValueError if this shard cannot become the home of `homes` and a standby for `standby`.

        Every expert must exist and be in only one of the two arguments. The experts `homes` must fit into device memory
        beside the experts whose home is this shard already.
        """
        self.check_exists(homes)
        self.check_exists(standby)
        if twice := keys_of(homes) & keys_of(standby):
            experts = group_by_layer(twice)
            raise ValueError(f"The experts {experts} are in both homes and standbys; name each expert only once.")
        num_bytes = self.on_device.nbytes(key for key in keys_of(homes) if not self.is_home(key))
        if self.held_bytes + num_bytes > self.memory_budget:
            numbers = f"{num_bytes} bytes more than the {self.held_bytes} in use, over a budget of {self.memory_budget}"
            raise ValueError(f"The experts to load need {numbers}; raise memory_budget or place fewer experts here.")

    def check_exists(self, experts: Experts) -> None:
        """Raise ValueError if the model does not have one of `experts`."""
        for layer, ids in experts.items():
            if layer not in self.shapes:
                layers = sorted(self.shapes)
                raise ValueError(f"Layer {layer} has no routed experts; the layers that have them are {layers}.")
            end = self.shapes[layer].num_experts
            if wrong := [expert for expert in ids if not 0 <= expert < end]:
                raise ValueError(f"Layer {layer} has no experts {wrong}; its experts are 0 to {end - 1}.")

    def max_promoted(self, layer: int) -> int:
        """Return how many experts of `layer` can be promoted at once, if no expert of another layer is promoted."""
        return (self.memory_budget - self.held_bytes) // self._memory[layer].device

    def fill_device(self, key: Key, weights: Weights) -> ExpertMetadata:
        """Copy the weights of an expert to the device memory reserved by `pin`, and return the expert's metadata.

        Computing the gain exponent is slow. If an earlier load has computed the gain exponent, the earlier value is
        used.
        """
        known = self.metadata(key)
        gain = self.on_device.fill(key, weights, known.gain if known else weights.gain)
        return ExpertMetadata(weights.checksum, gain)

    def commit(self, homes: Experts, standby: Experts, staged: StagedExperts) -> None:
        """Give all experts of a load their new roles at once.

        If this shard changes from home to standby of an expert, the expert stays on the device as a promoted expert.
        """
        for key, metadata in staged.metadata.items():
            if self._metadata.get(key) != metadata:
                self._uncount_gain(key)
                self._metadata[key] = metadata
                self._gain_counts[key[0]][metadata.gain] += 1
        for key in keys_of(homes):
            assert key in self.on_device
            self.on_device.mark_ready(key)
            self._set_home(key, True)
            self.on_device.unmark_promoted(key)
            self.standbys.remove(key)
        for key in keys_of(standby):
            if key in staged.standbys:
                self.standbys.add(key, *staged.standbys[key])
            if self.is_home(key):
                self._set_home(key, False)
                self.on_device.mark_promoted(key)
        for layer in {*homes, *standby} - self._logged_layers:
            if log_wide_spread(layer, self._gain_counts[layer]):
                self._logged_layers.add(layer)

    def commit_promotion(self, key: Key, weights: Weights | None) -> bool:
        """Allow requests to be computed with a promoted expert; return False if the expert was unloaded meanwhile.

        The memory of an expert that was unloaded is freed. `weights` are a copy for host memory, or None if the
        promotion made no copy.
        """
        if key not in self.standbys:
            self.free([key])
            return False
        self.on_device.mark_ready(key)
        self.on_device.mark_promoted(key)
        self.standbys.note_promotion(key, weights)
        return True

    def unload(self, homes: Experts, standby: Experts) -> None:
        """Give up the homes `homes` and the standbys `standby`; experts that this shard does not hold are ignored.

        An expert is also ignored if its role here differs from the role in the arguments. Raise ValueError if the model
        does not have one of the experts.
        """
        self.check_exists(homes)
        self.check_exists(standby)
        gone = {key for key in keys_of(homes) if self.is_home(key)}
        gone |= {key for key in keys_of(standby) if key in self.standbys}
        # An expert that is being promoted is freed by `commit_promotion`, when its weights have come.
        self.free(key for key in gone if self.on_device.is_ready(key))
        for key in gone:
            self.standbys.remove(key)
            self._uncount_gain(key)
            self._metadata.pop(key, None)

    def free(self, keys: Iterable[Key]) -> None:
        """Free the device memory of experts, loaded or not; this shard is then no longer a home of these experts."""
        keys = list(keys)
        for key in keys:
            self._set_home(key, False)
        self.on_device.free(keys)

    def _uncount_gain(self, key: Key) -> None:
        """Remove an expert from the counts of its layer, if this shard holds the expert."""
        if (metadata := self._metadata.get(key)) is not None:
            counts = self._gain_counts[key[0]]
            counts[metadata.gain] -= 1
            if not counts[metadata.gain]:
                del counts[metadata.gain]

    def _set_home(self, key: Key, is_home: bool) -> None:
        layer, expert = key
        self._is_home[layer][expert] = is_home

    # Computing -------------------------------------------------------------------------------------------------------

    def compute(self, request: pb.ComputeRequest) -> pb.Sums:
        """Return the partial sum of each row over the request's picks.

        Raise Refused if the request is damaged, contradicts the model, or names experts that this shard does not hold.
        Raise NeedsPromotion if some experts are standbys that are not on the device.
        """
        picks, layer = _decode(request, self.shapes, self.dtype), request.layer
        is_ready_P = self.on_device.are_ready(layer, picks.expert_P)
        if is_ready_P.all():
            return sums_to_proto(self.on_device.partial_sums(layer, picks))
        self._check_hosted(request, picks.expert_P[~is_ready_P])
        sums_NL = np.zeros(picks.x_NL.shape, np.int64)
        return PendingRequest(layer, picks, sums_NL, np.ones(len(is_ready_P), np.bool_)).advance(self.on_device)

    def _check_hosted(self, request: pb.ComputeRequest, expert_P: NDArray[np.int32]) -> None:
        """Raise Refused if `expert_P` names an expert for which this shard is not a standby.

        The caller has found that none of these experts is on the device.
        """
        missing = tuple(e for e in np.unique(expert_P).tolist() if (request.layer, e) not in self.standbys)
        if not missing:
            return
        what = f"Experts {list(missing)} of layer {request.layer} are not held here"
        if request.epoch < self.epoch:
            detail = f"{what} any more: the epoch of the request is {request.epoch}, of this shard {self.epoch}."
            raise Refused(pb.Refusal.STALE_EPOCH, detail, missing)
        raise Refused(pb.Refusal.NOT_HOSTED, f"{what}.", missing)


def _decode(request: pb.ComputeRequest, shapes: Mapping[int, ExpertShape], dtype: torch.dtype) -> Picks:
    """Return the rows and picks of `request`.

    Raise Refused if the request is damaged or contradicts `shapes` or `dtype`.
    """
    body = checked_body(request)
    shape = shapes.get(request.layer)
    if shape is None:
        detail = f"layer is {request.layer}, but the layers with routed experts are {sorted(shapes)}."
        raise Refused(pb.Refusal.BAD_SHAPE, detail)
    if TORCH_DTYPES.get(request.dtype, dtype) != dtype:
        detail = f"dtype is {TORCH_DTYPES[request.dtype]}, but this shard computes in {dtype}."
        raise Refused(pb.Refusal.BAD_SHAPE, detail)
    return picks_from_proto(request, body, shape.input_dim, shape.num_experts)
