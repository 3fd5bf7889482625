"""`rebalance` implements DeepSeek's EPLB for comparison with our planner.

EPLB repeatedly adds a copy of the expert that has the highest load per copy. Then EPLB assigns the copies to shards;
the copy with the highest load comes first. `rebalance` implements EPLB's global policy for one node, and ignores the
running placement. `replicate` chooses the copies of all layers together. Three functions assign the copies, because
the times of the functions differ by a factor of a hundred. `pack_tensors` uses tensors, as DeepSeek's published code
does. `pack_lists` uses lists. `pack_together` handles all layers at once.

Legend: L layers, E experts of a layer, R additional copies of experts, N = E + R slots of all shards, G shards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.int64]
Floats = NDArray[np.float64]


def replicate(load_LE: Floats, num_slots: int) -> tuple[Array, Array]:
    """Return two arrays: the expert in each slot (L, N), and the number of copies of each expert (L, E)."""
    num_layers, num_experts = load_LE.shape
    expert_LN = np.tile(np.arange(num_slots), (num_layers, 1))
    copies_LE = np.ones((num_layers, num_experts), np.int64)
    rows = np.arange(num_layers)
    for slot in range(num_experts, num_slots):
        hottest_L = (load_LE / copies_LE).argmax(axis=1)
        expert_LN[:, slot] = hottest_L
        copies_LE[rows, hottest_L] += 1
    return expert_LN, copies_LE


def pack_tensors(load_LN: Floats, num_shards: int) -> Array:
    """Return the shard of each slot (L, N), using tensors as in DeepSeek's published code.

    The function assigns one slot after another and begins with the slot that has the highest load. Each slot goes to
    the shard with the lowest load of all shards with free slots. The function handles one layer after another. Each
    load is a tensor with one number.
    """
    load = torch.from_numpy(load_LN).float()
    order = load.sort(-1, descending=True).indices
    capacity = load.shape[1] // num_shards
    shard_of = torch.full_like(load, -1, dtype=torch.int64)
    for layer in range(len(load)):
        loads: list[torch.Tensor | float] = [0.0] * num_shards
        sizes = [0] * num_shards
        for slot in order[layer]:
            shard = min((i for i in range(num_shards) if sizes[i] < capacity), key=loads.__getitem__)
            shard_of[layer, slot] = shard
            loads[shard] += load[layer, slot]
            sizes[shard] += 1
    return shard_of.numpy()


def pack_lists(load_LN: Floats, num_shards: int) -> Array:
    """Return the same result as `pack_tensors`, but compute with lists of Python numbers."""
    num_layers, num_slots = load_LN.shape
    capacity = num_slots // num_shards
    order_LN = (-load_LN).argsort(axis=1, kind="stable").tolist()
    shard_LN = np.empty((num_layers, num_slots), np.int64)
    for layer in range(num_layers):
        loads, sizes, load_N = [0.0] * num_shards, [0] * num_shards, load_LN[layer].tolist()
        for slot in order_LN[layer]:
            shard = min((i for i in range(num_shards) if sizes[i] < capacity), key=loads.__getitem__)
            shard_LN[layer, slot] = shard
            loads[shard] += load_N[slot]
            sizes[shard] += 1
    return shard_LN


def pack_together(load_LN: Floats, num_shards: int) -> Array:
    """Return the same result as `pack_tensors`, but assign one slot of every layer in each iteration."""
    num_layers, num_slots = load_LN.shape
    capacity = num_slots // num_shards
    rows = np.arange(num_layers)
    order_LN = (-load_LN).argsort(axis=1, kind="stable")
    load_LG, size_LG = np.zeros((num_layers, num_shards)), np.zeros((num_layers, num_shards), np.int64)
    shard_LN = np.empty((num_layers, num_slots), np.int64)
    for slot_L in order_LN.T:
        shard_L = np.where(size_LG < capacity, load_LG, np.inf).argmin(axis=1)
        shard_LN[rows, slot_L] = shard_L
        load_LG[rows, shard_L] += load_LN[rows, slot_L]
        size_LG[rows, shard_L] += 1
    return shard_LN


def rebalance(
    load_LE: Floats, num_slots: int, num_shards: int, pack: Callable[[Floats, int], Array] = pack_lists
) -> tuple[Array, Array]:
    """Return two arrays: the expert of each slot (L, N) and the shard of each slot (L, N).

    The function `pack` assigns the slots to shards.
    """
    expert_LN, copies_LE = replicate(load_LE, num_slots)
    load_LN = np.take_along_axis(load_LE / copies_LE, expert_LN, axis=1)
    return expert_LN, pack(load_LN, num_shards)
