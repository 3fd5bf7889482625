"""`GPUS` lists the GPUs that a deployment can be sized for, with the figures of their public data sheets."""

from __future__ import annotations

from dataclasses import dataclass

GB, MB = 10**9, 10**6


@dataclass(frozen=True)
class Gpu:
    """A `Gpu` holds the figures of one kind of GPU.

    - `memory_bytes` counts a gigabyte as 10**9 bytes, which is the more cautious assumption. The B200 has 192 GB, of
      which a board leaves 180 GB to programs.
    - `bf16_flops` are dense FLOP/s. Quantized weights are widened to bf16, so that no other figure counts.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    bf16_flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("l4", 24 * GB, 0.300e12, 121e12),
        Gpu("l40s", 48 * GB, 0.864e12, 362e12),
        Gpu("a100", 80 * GB, 2.039e12, 312e12),
        Gpu("h100", 80 * GB, 3.35e12, 989e12),
        Gpu("h200", 141 * GB, 4.8e12, 989e12),
        Gpu("b200", 180 * GB, 8.0e12, 2250e12),
    )
}


def gpu_of(name: str) -> Gpu:
    """Return the GPU called `name`, ignoring case; raise ValueError with all names if no GPU has this name."""
    if name.lower() not in GPUS:
        raise ValueError(f"there is no GPU {name!r} to size for; allowed are {', '.join(GPUS)}")
    return GPUS[name.lower()]
