"""The functions and classes here model how much memory torch's allocators for CUDA reserve, without a GPU.

The source of the model is c10/cuda/CUDACachingAllocator.cpp, and for page-locked memory the header
ATen/core/CachingHostAllocator.h. `tests/model/configs/test_expert_memory.py` compares the constants with the installed
headers. The model assumes the default settings of PYTORCH_ALLOC_CONF.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

MIN_BLOCK, SMALL, SMALL_SEGMENT = 512, 1 << 20, 2 << 20  # kMinBlockSize, kSmallSize, kSmallBuffer
LARGE, LARGE_SEGMENT, SEGMENT_STEP = 10 << 20, 20 << 20, 2 << 20  # kMinLargeAlloc, large_segment_size, kRoundLarge

CUDA, META = 1, 14  # numbers of c10::DeviceType


def rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


def pinned_block(size: int) -> int:
    """Return the bytes of page-locked memory that torch allocates for `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length()


class CachingAllocator:
    """A `CachingAllocator` reserves segments of device memory and cuts blocks of them; it never frees a block."""

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, list[int]] = {True: [], False: []}  # sizes of free blocks; the key is: small

    def allocate(self, size: int) -> None:
        size = rounded_up(max(size, 1), MIN_BLOCK)
        is_small = size <= SMALL
        free = self._free[is_small]
        block = min((block for block in free if block >= size), default=0)
        if block:
            free.remove(block)
        else:
            block = SMALL_SEGMENT if is_small else LARGE_SEGMENT if size < LARGE else rounded_up(size, SEGMENT_STEP)
            self.reserved += block
        if (rest := block - size) >= (MIN_BLOCK if is_small else SMALL + 1):
            free.append(rest)


@contextmanager
def fake_cuda() -> Iterator[AllocationRecorder]:
    """Let the `with` block use tensors on `cuda:0` that are fake: they have sizes, but no numbers, and need no GPU.

    Before torch copies a tensor, it calls the guard of the tensor's device. Without a GPU, the guard of CUDA fails, so
    the guard of the meta device, which does nothing, takes its place.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[META], "the meta device has no guard, so this is another layout of torch"
    original, guards[CUDA] = guards[CUDA], guards[META]
    try:
        with FakeTensorMode(), AllocationRecorder() as recorder:
            yield recorder
    finally:
        guards[CUDA] = original


class AllocationRecorder(TorchDispatchMode):
    """An `AllocationRecorder` notes the bytes of each tensor that is allocated on a GPU while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._seen: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen[storage._cdata] = storage
                    self.sizes.append(storage.nbytes())
        return out
