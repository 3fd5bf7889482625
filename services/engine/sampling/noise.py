"""The noise with which tokens are drawn depends only on the request's seed, the position and the token id.

The generator is Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) with the seed as its
key and (id // 2, position, 0) as its counter. The four words of a block give the 52-bit uniforms of two token ids.
On a CPU the code is compiled with numba; on other devices torch computes the same integers.

Legend: S rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, HALF, HIGH_BITS, LOW_BITS, ZERO = (np.uint64(n) for n in (0xFFFFFFFF, 32, 20, 12, 0))
UNIT = 2.0**-52
PIECE = 512  # ids whose noise is made at once: 512 values fit the L1 cache, and few pieces of a peaked row need noise


def draw_tokens(weights_SV: Tensor, keys: Sequence[tuple[int, int]]) -> list[int]:
    """Return one token id per row, drawn with probability proportional to its weight.

    `keys` holds the (seed, position) of each row. Every row must have at least one positive weight.

    The method is Gumbel-max in its exponential form: for each id, E is an exponentially distributed random number, and
    the id with the largest weight / E is drawn. The uniforms lie strictly between 0 and 1, so an id of weight 0 is
    never drawn.
    """
    seeds = np.array([seed % 2**64 for seed, _ in keys], dtype=np.uint64)
    positions = np.array([position for _, position in keys], dtype=np.uint64)
    if weights_SV.is_cpu:
        tokens = np.empty(len(keys), dtype=np.int64)
        _draw_rows(np.ascontiguousarray(weights_SV.numpy(), dtype=np.float32), seeds, positions, tokens)
        return list(map(int, tokens))
    uniform_SV = uniforms_on_device(seeds, positions, weights_SV.shape[-1], weights_SV.device)
    drawn: list[int] = (weights_SV / -torch.log1p(-uniform_SV)).argmax(dim=-1).tolist()
    return drawn


def uniforms(seed: int, position: int, vocab_size: int) -> NDArray[np.float64]:
    """Return the uniforms (V,) of all token ids for a seed and a position; each lies strictly between 0 and 1."""
    noise_V = np.empty(vocab_size + vocab_size % 2)
    _fill(noise_V, ZERO, np.uint64(seed % 2**64), np.uint64(position))
    return noise_V[:vocab_size]


def uniforms_on_device(
    seeds: NDArray[np.uint64], positions: NDArray[np.uint64], vocab_size: int, device: torch.device
) -> Tensor:
    """Return one row of `uniforms` for each pair of seed and position, (S, V) in fp64, computed on `device`."""

    def words(values: NDArray[np.uint64]) -> tuple[Tensor, Tensor]:
        halves = [(values & LOW).astype(np.int64), (values >> HALF).astype(np.int64)]
        low, high = (torch.from_numpy(half)[:, None].to(device) for half in halves)
        return low, high

    blocks_B = torch.arange(-(-vocab_size // 2), device=device)
    key_0, key_1 = words(seeds)
    counter_1, counter_2 = words(positions)
    counter_0, counter_3 = blocks_B.expand(len(seeds), -1), torch.zeros_like(blocks_B)
    low = int(LOW)
    for _ in range(10):
        # Products wrap around in int64, which keeps their 64 bits; the mask removes the sign bits that the shift adds.
        product_0, product_1 = counter_0 * int(MULTIPLIER_0), counter_2 * int(MULTIPLIER_1)
        counter_0, counter_2 = (
            (product_1 >> 32 & low) ^ counter_1 ^ key_0,
            (product_0 >> 32 & low) ^ counter_3 ^ key_1,
        )
        counter_1, counter_3 = product_1 & low, product_0 & low
        key_0, key_1 = key_0 + int(WEYL_0) & low, key_1 + int(WEYL_1) & low
    high_SB2 = torch.stack(torch.broadcast_tensors(counter_0, counter_2), dim=-1)
    low_SB2 = torch.stack(torch.broadcast_tensors(counter_1, counter_3), dim=-1)
    bits_SV = (high_SB2 << 20 | low_SB2 >> 12).flatten(1)[:, :vocab_size]
    return (bits_SV.double() + 0.5) * UNIT


@njit(nogil=True, cache=True)
def _fill(noise_N, first_id, seed, position):  # type: ignore[no-untyped-def]
    """Write the uniforms of the ids from `first_id` on into `noise_N`; `first_id` and N must be even."""
    for i in range(noise_N.shape[0] // 2):
        block = (first_id >> np.uint64(1)) + np.uint64(i)
        c0, c1, c2, c3 = block, position & LOW, position >> HALF, ZERO
        k0, k1 = seed & LOW, seed >> HALF
        for _ in range(10):
            p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
            c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
            k0, k1 = (k0 + WEYL_0) & LOW, (k1 + WEYL_1) & LOW
        noise_N[2 * i] = (np.float64((c0 << HIGH_BITS) | (c1 >> LOW_BITS)) + 0.5) * UNIT
        noise_N[2 * i + 1] = (np.float64((c2 << HIGH_BITS) | (c3 >> LOW_BITS)) + 0.5) * UNIT


@njit(nogil=True, cache=True)
def _draw_rows(weights_SV, seeds_S, positions_S, tokens_S):  # type: ignore[no-untyped-def]
    noise_P = np.empty(PIECE)
    for s in range(weights_SV.shape[0]):
        weights_V = weights_SV[s]
        best, best_id = 0.0, -1
        for first in range(0, weights_V.shape[0], PIECE):
            piece = weights_V[first : first + PIECE]
            # The exponential number E of an id is never below the id's uniform. A uniform is never below UNIT / 2. So
            # an id that cannot win needs no logarithm, and a piece in which no id can win needs no noise.
            num_able = 0
            for i in range(piece.shape[0]):
                num_able += piece[i] > best * (UNIT / 2)
            if num_able == 0:
                continue
            _fill(noise_P, np.uint64(first), seeds_S[s], positions_S[s])
            for i in range(piece.shape[0]):
                if piece[i] > best * noise_P[i]:
                    score = piece[i] / -math.log1p(-noise_P[i])
                    if score > best:
                        best, best_id = score, first + i
        tokens_S[s] = best_id
