"""What a shard holds, what it stands by for, and the arithmetic on it: no network, no files, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.topology import held_digest
from model.blocks.moe import ExpertBank, ExpertShape
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.standbys import Key, StandbyStore
from services.expert.transport.dispatch_combine import warm_up
from services.expert.transport.wire import TORCH_DTYPES, Picks, Refused, checked_body, picks_from_proto, sums_to_proto
from services.expert.weights import Weights

ExpertsByLayer = dict[int, list[int]]  # experts by layer
HOT_PROMOTIONS = 3  # an expert that was promoted as often makes room for others last


def keys_of(wanted: ExpertsByLayer) -> set[Key]:
    return {(layer, expert) for layer, experts in wanted.items() for expert in experts}


def by_layer(keys: Iterable[Key]) -> ExpertsByLayer:
    wanted: ExpertsByLayer = {}
    for layer, expert in sorted(keys):
        wanted.setdefault(layer, []).append(expert)
    return wanted


class NoDeviceMemory(Exception):
    """The device's memory is taken by experts that cannot go right now."""


@dataclass
class PartialResult:
    """A request of which some picks wait for experts that stand by."""

    layer: int
    picks: Picks
    sums_NL: NDArray[np.int64]
    is_left_P: NDArray[np.bool_]

    @property
    def experts(self) -> list[int]:
        """Those that are waited for."""
        return [int(expert) for expert in np.unique(self.picks.expert_P[self.is_left_P])]


class NeedsPromotion(Exception):
    """Some experts of a request stand by and must be promoted before `resume` can go on with it."""

    def __init__(self, unfinished: PartialResult) -> None:
        super().__init__(f"Experts {unfinished.experts} of layer {unfinished.layer} stand by.")
        self.unfinished = unfinished


@dataclass
class _OnDevice:
    """An expert that has memory on the device, whether it is loaded yet or not."""

    num_pins: int = 0  # of those who need it to stay
    last_use: int = 0  # a number that grows with every call


@dataclass(frozen=True)
class ExpertFacts:
    """What was found out about an expert when it was loaded."""

    checksum: int
    gain: int


@dataclass
class LoadedExperts:
    """What a load brings besides the homes, whose weights are in their banks by then."""

    known: dict[Key, ExpertFacts] = field(default_factory=dict)
    standbys: dict[Key, tuple[Weights | None, str]] = field(default_factory=dict)  # and the peer that had it


@cache
def _warm_up_bank(dtype: torch.dtype, device: torch.device) -> None:
    """Loads or compiles the kernels that loading and computing need, where there are any, before the first expert."""
    bank = ExpertBank(ExpertShape(layer=0, num_experts=1, top_k=1, input_dim=2, width=2), dtype, device)
    if bank.is_compiled:
        bank.load(0, {"up": torch.ones(2, 2), "down": torch.ones(2, 2)})
        bank.warm_up(0)


class ExpertHost:
    """The experts in one process: empty at first, counted against a budget for the device and one for host memory.

    An expert is held (its home is here), or stands by in host memory or on disk and is promoted to the device when a
    call asks for it; what is promoted makes room for everything else. Changes belong to one thread, the one that
    computes, except for `banks[layer].load` of an expert that was taken; reading belongs to any.
    """

    def __init__(
        self,
        shapes: Iterable[ExpertShape],
        dtype: torch.dtype,
        device: torch.device,
        memory_budget: int,
        host_budget: int = 0,
    ) -> None:
        self.shapes = {shape.layer: shape for shape in shapes}
        self.banks = {layer: ExpertBank(shape, dtype, device) for layer, shape in self.shapes.items()}
        self.dtype, self.device, self.memory_budget = dtype, device, memory_budget
        self.standbys = StandbyStore(host_budget)
        self.epoch = 0
        warm_up()
        _warm_up_bank(dtype, device)
        self._is_home, self._is_ready = (
            {layer: np.zeros(shape.num_experts, dtype=np.bool_) for layer, shape in self.shapes.items()}
            for _ in range(2)
        )
        self._on_device: dict[Key, _OnDevice] = {}
        self._promoted: set[Key] = set()  # on the device and ready, but not at home here
        self._known: dict[Key, ExpertFacts] = {}
        self._num_calls = 0
        self.used_bytes = 0  # on the device, with what is promoted or being loaded

    @property
    def held(self) -> ExpertsByLayer:
        """The experts whose home is here, by layer; layers without one are left out."""
        held = {layer: is_home.nonzero()[0].tolist() for layer, is_home in self._is_home.items()}
        return {layer: experts for layer, experts in held.items() if experts}

    @property
    def standby(self) -> ExpertsByLayer:
        """The experts that stand by here, wherever they are, likewise."""
        return by_layer(self.standbys.keys)

    @property
    def promoted(self) -> ExpertsByLayer:
        """Those of `standby` that are on the device for now."""
        return by_layer(self._promoted.copy())

    @property
    def num_held(self) -> int:
        return sum(int(is_home.sum()) for is_home in self._is_home.values())

    @property
    def held_bytes(self) -> int:
        return sum(int(self._is_home[layer].sum()) * shape.nbytes(self.dtype) for layer, shape in self.shapes.items())

    @property
    def digest(self) -> str:
        return held_digest(self.held, self.standby)

    def is_home(self, key: Key) -> bool:
        return bool(self._is_home[key[0]][key[1]])

    def is_ready(self, key: Key) -> bool:
        return bool(self._is_ready[key[0]][key[1]])

    def nbytes(self, key: Key) -> int:
        return self.shapes[key[0]].nbytes(self.dtype)

    def known(self, key: Key) -> ExpertFacts | None:
        """Its checksum and gain, once it was loaded here."""
        return self._known.get(key)

    def gains(self, wanted: ExpertsByLayer) -> dict[int, int]:
        """The largest gain exponent of all that is held or stands by, of these layers."""
        gains: dict[int, int] = {}
        for (layer, _), known in list(self._known.items()):
            if layer in wanted:
                gains[layer] = max(known.gain, gains.get(layer, known.gain))
        return gains

    # What is where ---------------------------------------------------------------------------------------------------

    def check_fits(self, homes: ExpertsByLayer, standby: ExpertsByLayer) -> None:
        """Raises ValueError where an expert does not exist, is asked for twice or does not fit with those held."""
        self.check_exists(homes)
        self.check_exists(standby)
        if twice := keys_of(homes) & keys_of(standby):
            raise ValueError(f"The experts {by_layer(twice)} cannot be held and stand by at once; ask for one of them.")
        num_bytes = self._nbytes(key for key in keys_of(homes) if not self.is_home(key))
        if self.held_bytes + num_bytes > self.memory_budget:
            numbers = f"{num_bytes} bytes more than the {self.held_bytes} in use, over a budget of {self.memory_budget}"
            raise ValueError(f"The experts asked for need {numbers}; raise memory_budget or place fewer here.")

    def check_exists(self, wanted: ExpertsByLayer) -> None:
        for layer, experts in wanted.items():
            if layer not in self.shapes:
                known = sorted(self.shapes)
                raise ValueError(f"Layer {layer} has no routed experts; the layers that have them are {known}.")
            end = self.shapes[layer].num_experts
            if wrong := [expert for expert in experts if not 0 <= expert < end]:
                raise ValueError(f"Layer {layer} has no experts {wrong}; its experts are 0 to {end - 1}.")

    def num_slots(self, layer: int) -> int:
        """How many experts of a layer can be promoted at once, if nothing else is."""
        return (self.memory_budget - self.held_bytes) // self.shapes[layer].nbytes(self.dtype)

    def take(self, keys: Iterable[Key], *, for_homes: bool = False) -> set[Key]:
        """Device memory for experts, which `release` lets go; returns those that are to be loaded into it.

        Promoted experts make room, the least recently used first and hot ones last; those that others need stay, unless
        the room is for homes. Raises NoDeviceMemory, after which nothing is taken.
        """
        wanted = set(keys)
        new = {key for key in wanted if key not in self._on_device}
        missing = self.used_bytes + self._nbytes(new) - self.memory_budget
        evicted = []
        for key in self._evictable(wanted, for_homes) if missing > 0 else []:
            evicted.append(key)
            missing -= self.nbytes(key)
            if missing <= 0:
                break
        if missing > 0:
            raise NoDeviceMemory(f"{missing} bytes are missing on the device, and nothing more can make room.")
        self.drop(evicted)
        self.used_bytes += self._nbytes(new)
        for key in wanted:
            self._on_device.setdefault(key, _OnDevice()).num_pins += 1
        return new

    def _evictable(self, wanted: set[Key], for_homes: bool) -> list[Key]:
        free = [
            (self._is_hot(key), self._on_device[key].last_use, key)
            for key in self._promoted - wanted
            if for_homes or not self._on_device[key].num_pins
        ]
        return [key for _, _, key in sorted(free)]

    def _is_hot(self, key: Key) -> bool:
        standby = self.standbys.get(key)
        return standby is not None and standby.num_promotions >= HOT_PROMOTIONS

    def release(self, keys: Iterable[Key]) -> None:
        """Takes back a pin of each."""
        for key in keys:
            if (one := self._on_device.get(key)) is not None:
                one.num_pins = max(0, one.num_pins - 1)

    def drop(self, keys: Iterable[Key]) -> None:
        """Frees device memory, loaded or not."""
        for layer, expert in keys:
            self._is_ready[layer][expert] = self._is_home[layer][expert] = False
            self._promoted.discard((layer, expert))
            self.banks[layer].unload(expert)
            if self._on_device.pop((layer, expert), None) is not None:
                self.used_bytes -= self.nbytes((layer, expert))

    def settle(self, homes: ExpertsByLayer, standby: ExpertsByLayer, loaded: LoadedExperts) -> None:
        """Makes what was loaded count, all at once; an expert that was held and is to stand by stays on the device."""
        self._known |= loaded.known
        for key in keys_of(homes):
            assert key in self._on_device
            self._set_ready(key)
            self._is_home[key[0]][key[1]] = True
            self._promoted.discard(key)
            self.standbys.remove(key)
        for key in keys_of(standby):
            if key in loaded.standbys:
                self.standbys.add(key, *loaded.standbys[key])
            if self.is_home(key):
                self._is_home[key[0]][key[1]] = False
                self._promoted.add(key)

    def settle_promoted(self, key: Key, weights: Weights | None) -> bool:
        """Makes a promoted expert count; False, and it is gone, if it does not stand by any more."""
        if key not in self.standbys:
            self.drop([key])
            return False
        self._set_ready(key)
        self._promoted.add(key)
        self.standbys.note_promotion(key, weights)
        return True

    def remove(self, homes: ExpertsByLayer, standby: ExpertsByLayer) -> None:
        """Lets experts go; those that are not here are passed over. ValueError where one does not exist."""
        self.check_exists(homes)
        self.check_exists(standby)
        gone = {key for key in keys_of(homes) if self.is_home(key)}
        gone |= {key for key in keys_of(standby) if key in self.standbys}
        self.drop(key for key in gone if self.is_ready(key))  # what is being loaded goes when it is
        for key in gone:
            self.standbys.remove(key)
            self._known.pop(key, None)

    def _set_ready(self, key: Key) -> None:
        self._is_ready[key[0]][key[1]] = True
        self._on_device[key].last_use = self._num_calls

    def _nbytes(self, keys: Iterable[Key]) -> int:
        return sum(map(self.nbytes, keys))

    # Arithmetic ------------------------------------------------------------------------------------------------------

    def compute(self, request: pb.ComputeRequest) -> pb.Sums:
        """The partial sum of each row over its picks; raises Refused, or NeedsPromotion where experts stand by."""
        picks, layer = self._decode(request), request.layer
        is_ready_P = self._is_ready[layer][picks.expert_P]
        if is_ready_P.all():
            return sums_to_proto(self._sums(layer, picks))
        self._check_known(request, picks.expert_P[~is_ready_P])
        sums_NL = np.zeros(picks.x_NL.shape, np.int64)
        return self.resume(PartialResult(layer, picks, sums_NL, np.ones(len(is_ready_P), np.bool_)))

    def resume(self, unfinished: PartialResult) -> pb.Sums:
        """Computes what can be computed by now; raises NeedsPromotion until nothing is left."""
        picks, layer = unfinished.picks, unfinished.layer
        is_next_P = unfinished.is_left_P & self._is_ready[layer][picks.expert_P]
        if is_next_P.any():
            unfinished.sums_NL += self._sums(layer, picks.only(is_next_P))
            unfinished.is_left_P &= ~is_next_P
        if unfinished.is_left_P.any():
            raise NeedsPromotion(unfinished)
        return sums_to_proto(unfinished.sums_NL)

    def _sums(self, layer: int, picks: Picks) -> NDArray[np.int64]:
        self._note_use(layer, picks.expert_P)
        bank = self.banks[layer]
        if bank.is_compiled:
            return bank.packed_sums(picks.x_NL, picks.row_P, picks.expert_P, picks.weight_P, picks.grid_N)
        sums_NL: NDArray[np.int64] = bank.partial_sums(*self._as_tensors(picks)).cpu().numpy()
        return sums_NL

    def _note_use(self, layer: int, expert_P: NDArray[np.int32]) -> None:
        self._num_calls += 1
        if self._promoted:
            for expert in np.unique(expert_P[~self._is_home[layer][expert_P]]).tolist():
                self._on_device[layer, expert].last_use = self._num_calls

    def _as_tensors(self, picks: Picks) -> tuple[Tensor, ...]:
        x_NL = torch.from_numpy(picks.x_NL.copy())  # copies, because torch warns about read-only memory
        x_NL = x_NL.view(torch.bfloat16) if self.dtype == torch.bfloat16 else x_NL
        row_P, expert_P = (torch.from_numpy(ids.astype(np.int64)) for ids in (picks.row_P, picks.expert_P))
        weight_P, grid_N = (torch.from_numpy(numbers.copy()) for numbers in (picks.weight_P, picks.grid_N))
        return x_NL.to(self.device), row_P, expert_P, weight_P, grid_N

    def _decode(self, request: pb.ComputeRequest) -> Picks:
        body = checked_body(request)
        shape = self.shapes.get(request.layer)
        if shape is None:
            detail = f"layer is {request.layer}, but the layers with routed experts are {sorted(self.shapes)}."
            raise Refused(pb.Refusal.BAD_SHAPE, detail)
        if TORCH_DTYPES.get(request.dtype, self.dtype) != self.dtype:
            detail = f"dtype is {TORCH_DTYPES[request.dtype]}, but this shard computes in {self.dtype}."
            raise Refused(pb.Refusal.BAD_SHAPE, detail)
        return picks_from_proto(request, body, shape.input_dim, shape.num_experts)

    def _check_known(self, request: pb.ComputeRequest, expert_P: NDArray[np.int32]) -> None:
        """Of the experts that are not on the device: raises Refused for those that do not stand by either."""
        missing = tuple(e for e in np.unique(expert_P).tolist() if (request.layer, e) not in self.standbys)
        if not missing:
            return
        what = f"Experts {list(missing)} of layer {request.layer} are not held here"
        if request.epoch < self.epoch:
            detail = f"{what} any more: the request is of epoch {request.epoch}, this shard of {self.epoch}."
            raise Refused(pb.Refusal.STALE_EPOCH, detail, missing)
        raise Refused(pb.Refusal.NOT_HOSTED, f"{what}.", missing)
