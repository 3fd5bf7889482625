"""`DeviceExperts` manages a shard's device memory and computes with the experts in this memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import kernels
from model.blocks.expert_bank import ExpertBank, memory_on
from model.blocks.expert_slots import ExpertSlots
from model.configs.expert_shape import ExpertShape
from model.stored_matrix import StoredMatrix
from services.expert.transport.wire import Picks
from services.expert.weights.load_order import Key
from services.expert.weights.standbys import StandbyStore
from services.expert.weights.weights import Weights


class NoDeviceMemory(Exception):
    """A `NoDeviceMemory` error says that the device memory is full and evictions cannot free enough of it."""


@dataclass
class _DeviceSlot:
    """A `_DeviceSlot` is the device memory of one expert; this memory is reserved before the expert is loaded."""

    num_pins: int = 0  # number of loads and requests that need the expert on the device
    last_use: int = 0  # the number of the last computation that used the expert


@cache
def _warm_up_bank(dtype: torch.dtype, device: torch.device) -> None:
    """Compile the device's kernels for loading and computing, if there are any, before the first expert comes."""
    if kernels.is_compiled(device):
        bank = ExpertBank(ExpertShape(layer=0, num_experts=1, top_k=1, input_dim=2, width=2), dtype, device)
        ones = StoredMatrix.plain(torch.ones(2, 2))
        bank.load(0, {"up": ones, "down": ones})
        bank.warm_up(0)


class DeviceExperts:
    """`DeviceExperts` holds experts in device memory, up to a budget in bytes, and computes with these experts.

    On a GPU, the constructor allocates slots for as many experts as fit into the budget, and raises RuntimeError if the
    device does not have the memory.

    First `pin` reserves memory for an expert. Then `fill` loads the weights, and after `mark_ready` requests are
    computed with the expert. When memory runs short, promoted experts are evicted: the least recently used experts
    first, hot experts last.

    Only the worker's thread may call the methods, with two exceptions: any thread may call `fill` and the methods that
    only read.
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
        self._nbytes = {layer: memory.device for layer, memory in memory_on(shapes.values(), dtype, device).items()}
        slots = None if kernels.is_compiled(device) else self._allocate_slots()
        self.banks = {layer: ExpertBank(shape, dtype, device, slots) for layer, shape in shapes.items()}
        self.used_bytes = 0  # bytes of all slots, including slots whose experts are not loaded yet
        self.promoted: set[Key] = set()  # standbys that are ready, and may be evicted
        self._standbys = standbys
        self._slots: dict[Key, _DeviceSlot] = {}
        self._is_ready, self._is_promoted = (
            {layer: np.zeros(shape.num_experts, dtype=np.bool_) for layer, shape in shapes.items()} for _ in range(2)
        )
        self._num_computations = 0

    def _allocate_slots(self) -> ExpertSlots:
        slot_bytes = max(self._nbytes.values())
        num_experts = sum(shape.num_experts for shape in self.shapes.values())
        return ExpertSlots(slot_bytes, min(num_experts, self.memory_budget // slot_bytes), self.device)

    def __contains__(self, key: Key) -> bool:
        """Return True if the expert has a slot, even if the expert is not loaded yet."""
        return key in self._slots

    def nbytes(self, keys: Iterable[Key]) -> int:
        """Return the bytes that the experts of `keys` take on the device."""
        return sum(self._nbytes[layer] for layer, _ in keys)

    def is_ready(self, key: Key) -> bool:
        layer, expert = key
        return bool(self._is_ready[layer][expert])

    def are_ready(self, layer: int, expert_P: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return for each pick whether its expert can be computed now: bool (P,)."""
        is_ready_P: NDArray[np.bool_] = self._is_ready[layer][expert_P]
        return is_ready_P

    def pin(self, keys: Iterable[Key], *, for_homes: bool = False) -> set[Key]:
        """Reserve device memory for the experts of `keys` and keep the experts there until `unpin`.

        If memory is short, promoted experts are evicted. Promoted experts that are pinned are evicted only if
        `for_homes` is true. Return the keys of the experts that had no memory before; the caller has to load these
        experts. If evictions cannot free enough memory, NoDeviceMemory is raised, and nothing has changed.
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
        """Remove one pin from each expert of `keys` that still has device memory."""
        for key in keys:
            if (slot := self._slots.get(key)) is not None:
                slot.num_pins = max(0, slot.num_pins - 1)

    def free(self, keys: Iterable[Key]) -> None:
        """Free the device memory of experts, including experts that are not loaded yet."""
        for layer, expert in keys:
            self._is_ready[layer][expert] = False
            self.unmark_promoted((layer, expert))
            self.banks[layer].unload(expert)
            if self._slots.pop((layer, expert), None) is not None:
                self.used_bytes -= self.nbytes([(layer, expert)])

    def fill(self, key: Key, weights: Weights, gain: int | None) -> int:
        """Copy `weights` to the device and return the expert's gain exponent, which is computed if `gain` is None."""
        layer, expert = key
        self.banks[layer].load(expert, weights.matrices, gain)
        return self.banks[layer].gain_exponent(expert)

    def mark_ready(self, key: Key) -> None:
        """Allow requests to be computed with the expert from now on; the weights must be loaded."""
        layer, expert = key
        self._is_ready[layer][expert] = True
        self._slots[key].last_use = self._num_computations

    def mark_promoted(self, key: Key) -> None:
        """Count the expert as a promoted standby, which may be evicted."""
        layer, expert = key
        self.promoted.add(key)
        self._is_promoted[layer][expert] = True

    def unmark_promoted(self, key: Key) -> None:
        """Count the expert as a promoted standby no longer, because it is a home now or has left the device."""
        layer, expert = key
        self.promoted.discard(key)
        self._is_promoted[layer][expert] = False

    def partial_sums(self, layer: int, picks: Picks) -> NDArray[np.int64]:
        """Return the sum over the picks of each row: int64 (N, L), in units of 2**grid.

        The experts of all picks must be ready.
        """
        self._note_use(layer, picks.expert_P)
        bank = self.banks[layer]
        if bank.is_compiled:
            return bank.packed_sums(picks.x_NL, picks.row_P, picks.expert_P, picks.weight_P, picks.grid_N)
        sums_NL: NDArray[np.int64] = bank.partial_sums(*self._as_tensors(picks)).cpu().numpy()
        return sums_NL

    def _note_use(self, layer: int, expert_P: NDArray[np.int32]) -> None:
        self._num_computations += 1
        if self.promoted:
            for expert in np.unique(expert_P[self._is_promoted[layer][expert_P]]).tolist():
                self._slots[layer, expert].last_use = self._num_computations

    def _as_tensors(self, picks: Picks) -> tuple[Tensor, ...]:
        x_NL = torch.from_numpy(picks.x_NL.copy())  # a copy, because torch warns about read-only memory
        x_NL = x_NL.view(torch.bfloat16) if self.dtype == torch.bfloat16 else x_NL
        row_P, expert_P = (torch.from_numpy(ids.astype(np.int64)) for ids in (picks.row_P, picks.expert_P))
        weight_P, grid_N = (torch.from_numpy(numbers.copy()) for numbers in (picks.weight_P, picks.grid_N))
        return x_NL.to(self.device), row_P, expert_P, weight_P, grid_N
