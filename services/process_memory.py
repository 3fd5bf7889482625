"""`keep_freed_memory` makes a process keep freed memory, instead of giving it back and asking for it again."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt
KEPT_BYTES = 64 << 20  # freed bytes that each heap of the process keeps at most
MAX_SMALL_BYTES = 32 << 20  # arrays up to this size come from a heap; glibc allows no larger value


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next arrays; return False where the C library has no such options.

    By default, glibc gives an array of some megabytes back to the operating system when the array is freed. Then the
    kernel has to clear every page of the next array. Engines and shards free and allocate such arrays in each layer.
    For rows of 4 KB, this took a quarter of a shard's processor time while prompts were read.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    is_set = [mallopt(M_TRIM_THRESHOLD, KEPT_BYTES), mallopt(M_MMAP_THRESHOLD, MAX_SMALL_BYTES)]
    return all(is_set)
