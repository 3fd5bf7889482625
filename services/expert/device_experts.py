"""`DeviceExperts` manages a shard's device memory and computes with the experts in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.blocks.moe import ExpertBank, ExpertShape
from services.expert.load_order import Key
from services.expert.standbys import StandbyStore
from services.expert.transport.wire import Picks
from services.expert.weights import Weights


class NoDeviceMemory(Exception):
    """The device memory is full, and evicting every expert that may be evicted would not free enough of it."""


@dataclass
class _DeviceSlot:
    """A `_DeviceSlot` is the device memory of one expert, whether the expert is loaded already or not."""

    num_pins: int = 0  # number of loads and requests that need the expert to stay
    last_use: int = 0  # the number of the last computation that used the expert


@cache
def _warm_up_bank(dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels that loading and computing need, if the device has any, before the first expert comes."""
    bank = ExpertBank(ExpertShape(layer=0, num_experts=1, top_k=1, input_dim=2, width=2), dtype, device)
    if bank.is_compiled:
        bank.load(0, {"up": torch.ones(2, 2), "down": torch.ones(2, 2)})
        bank.warm_up(0)


class DeviceExperts:
    """`DeviceExperts` holds experts in device memory, up to a budget in bytes, and computes with them.

    An expert is pinned first, which reserves memory for it. Then it is loaded with `fill`, and from `mark_ready` on it
    is computed with. When memory runs short, promoted experts are evicted: least recently used first, hot ones last.

    All methods belong to the worker's thread, except `fill`, which may run on any thread, and those that only read.
    """

    def __init__(
        self,
        shapes: Mapping[int, ExpertShape],
        dtype: torch.dtype,
        device: torch.device,
        memory_budget: int,
        standbys: StandbyStore,
    ) -> None:
        _warm_up_bank(dtype, device)
        self.shapes, self.dtype, self.device, self.memory_budget = shapes, dtype, device, memory_budget
        self.banks = {layer: ExpertBank(shape, dtype, device) for layer, shape in shapes.items()}
        self.used_bytes = 0  # bytes of all slots, whether their experts are loaded or not
        self.promoted: set[Key] = set()  # ready standbys: the experts that may be evicted
        self._standbys = standbys
        self._slots: dict[Key, _DeviceSlot] = {}
        self._is_ready = {layer: np.zeros(shape.num_experts, dtype=np.bool_) for layer, shape in shapes.items()}
        self._num_computations = 0

    def __contains__(self, key: Key) -> bool:
        """Return True if the expert has a slot, whether it is loaded already or not."""
        return key in self._slots

    def nbytes(self, keys: Iterable[Key]) -> int:
        """Return the bytes that the experts of `keys` take on the device."""
        return sum(self.shapes[layer].nbytes(self.dtype) for layer, _ in keys)

    def is_ready(self, key: Key) -> bool:
        layer, expert = key
        return bool(self._is_ready[layer][expert])

    def are_ready(self, layer: int, expert_P: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return for each pick whether its expert can be computed now."""
        is_ready_P: NDArray[np.bool_] = self._is_ready[layer][expert_P]
        return is_ready_P

    def pin(self, keys: Iterable[Key], *, for_homes: bool = False) -> set[Key]:
        """Reserve device memory for the experts of `keys` and keep them there until `unpin`.

        Promoted experts are evicted if memory is short; pinned ones only if the memory is for homes. Return the keys
        that had no memory before, which the caller has to load. Raise NoDeviceMemory, and then nothing has changed.
        """
        pinned = set(keys)
        new = {key for key in pinned if key not in self._slots}
        missing = self.used_bytes + self.nbytes(new) - self.memory_budget
        evicted = []
        for key in self._eviction_order(pinned, for_homes) if missing > 0 else []:
            evicted.append(key)
            missing -= self.nbytes([key])
            if missing <= 0:
                break
        if missing > 0:
            raise NoDeviceMemory(f"{missing} bytes of device memory are missing, and no other expert can be evicted.")
        self.free(evicted)
        self.used_bytes += self.nbytes(new)
        for key in pinned:
            self._slots.setdefault(key, _DeviceSlot()).num_pins += 1
        return new

    def _eviction_order(self, kept: set[Key], for_homes: bool) -> list[Key]:
        candidates = [
            (self._standbys.is_hot(key), self._slots[key].last_use, key)
            for key in self.promoted - kept
            if for_homes or not self._slots[key].num_pins
        ]
        return [key for _, _, key in sorted(candidates)]

    def unpin(self, keys: Iterable[Key]) -> None:
        """Take back one pin of each expert that still has memory."""
        for key in keys:
            if (slot := self._slots.get(key)) is not None:
                slot.num_pins = max(0, slot.num_pins - 1)

    def free(self, keys: Iterable[Key]) -> None:
        """Free the memory of experts, whether they are loaded already or not."""
        for layer, expert in keys:
            self._is_ready[layer][expert] = False
            self.promoted.discard((layer, expert))
            self.banks[layer].unload(expert)
            if self._slots.pop((layer, expert), None) is not None:
                self.used_bytes -= self.nbytes([(layer, expert)])

    def fill(self, key: Key, weights: Weights, gain: int | None) -> int:
        """Copy `weights` to the device and return the expert's gain exponent, which is found if `gain` is None."""
        layer, expert = key
        self.banks[layer].load(expert, weights.tensors, gain)
        return self.banks[layer].gain_exponent(expert)

    def mark_ready(self, key: Key) -> None:
        """Let requests be computed with the expert, whose weights must be loaded, from now on."""
        layer, expert = key
        self._is_ready[layer][expert] = True
        self._slots[key].last_use = self._num_computations

    def partial_sums(self, layer: int, picks: Picks) -> NDArray[np.int64]:
        """Return each row's sum over its picks, whose experts must all be ready: int64 (N, L), in units of 2**grid."""
        self._note_use(layer, picks.expert_P)
        bank = self.banks[layer]
        if bank.is_compiled:
            return bank.packed_sums(picks.x_NL, picks.row_P, picks.expert_P, picks.weight_P, picks.grid_N)
        sums_NL: NDArray[np.int64] = bank.partial_sums(*self._as_tensors(picks)).cpu().numpy()
        return sums_NL

    def _note_use(self, layer: int, expert_P: NDArray[np.int32]) -> None:
        self._num_computations += 1
        if self.promoted:
            for expert in np.unique(expert_P).tolist():
                if (layer, expert) in self.promoted:
                    self._slots[layer, expert].last_use = self._num_computations

    def _as_tensors(self, picks: Picks) -> tuple[Tensor, ...]:
        x_NL = torch.from_numpy(picks.x_NL.copy())  # a copy, because torch warns about read-only memory
        x_NL = x_NL.view(torch.bfloat16) if self.dtype == torch.bfloat16 else x_NL
        row_P, expert_P = (torch.from_numpy(ids.astype(np.int64)) for ids in (picks.row_P, picks.expert_P))
        weight_P, grid_N = (torch.from_numpy(numbers.copy()) for numbers in (picks.weight_P, picks.grid_N))
        return x_NL.to(self.device), row_P, expert_P, weight_P, grid_N
