"""`Weights` are one routed expert's weights on their way between disk, host memory, peers and the device.

The checksum is the first 8 bytes of SHA-256 over `up`, then `down`, row by row, little-endian, in the dtype that the
shard computes in. So the checksum does not depend on where the bytes came from. For an expert of 11 MB in bf16, the
checksum takes 10 ms (measured). CRC-32 takes 7 ms, but has only 32 bits to tell experts apart; BLAKE2b takes 22 ms. For
comparison, packing the expert takes 25 ms and finding its gain exponent 70 ms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.blocks.moe import ExpertShape
from model.exact_sums import gain_exponent

CHUNK_BYTES = 512 << 10  # maximum bytes of weights in one message to a peer


@dataclass(frozen=True)
class Weights:
    """`Weights` are one expert's weights, contiguous and on the CPU, in the dtype that the shard computes in."""

    up: Tensor  # (M, L): M expert width, L expert input dim
    down: Tensor  # (L, M)
    gain: int | None = None  # the gain exponent, if it has been found already

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Weights:
        """Return weights made of the tensors "up" and "down" of a checkpoint or `ExpertBank`, converted to `dtype`."""
        up, down = (tensors[name].to("cpu", dtype).contiguous() for name in ("up", "down"))
        return cls(up, down)

    @classmethod
    def from_bytes(cls, data: bytearray, shape: ExpertShape, dtype: torch.dtype, gain: int | None = None) -> Weights:
        """Return the weights whose bytes are `data` (the joined `chunks`); the tensors share the memory of `data`."""
        assert len(data) == shape.nbytes(dtype)
        numbers = torch.frombuffer(data, dtype=dtype)
        up, down = numbers.split(shape.input_dim * shape.width)
        return cls(up.view(shape.width, shape.input_dim), down.view(shape.input_dim, shape.width), gain)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    @cached_property
    def checksum(self) -> int:
        """Return the checksum that the manifest records for these weights; the first access hashes all bytes."""
        digest = hashlib.sha256()
        for view in self._views():
            digest.update(view)
        return int.from_bytes(digest.digest()[:8], "little")

    def gain_exponent(self) -> int:
        """Return the gain exponent that an `ExpertBank` finds when it loads the expert."""
        return gain_exponent(self.up, self.down) if self.gain is None else self.gain

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes of `up`, then the bytes of `down`, in pieces of at most CHUNK_BYTES."""
        for view in self._views():
            for start in range(0, len(view), CHUNK_BYTES):
                yield view[start : start + CHUNK_BYTES]

    def _views(self) -> list[memoryview]:
        return [memoryview(tensor.view(-1).view(torch.uint8).numpy()) for tensor in (self.up, self.down)]  # type: ignore[arg-type]

    def in_host_memory(self, is_pinned: bool) -> Weights:
        """Return a copy of the weights in host memory, because the original may be mapped from the checkpoint's file.

        Page-locked memory (`is_pinned`) can be copied to a GPU without another copy in between.
        """
        up, down = (tensor.pin_memory() if is_pinned else tensor.clone() for tensor in (self.up, self.down))
        return Weights(up, down, self.gain)


@dataclass(frozen=True)
class ExpertMetadata:
    """`ExpertMetadata` holds the checksum and the gain exponent of an expert, which are found during a load."""

    checksum: int
    gain: int

    @property
    def seal(self) -> int:
        """Return a checksum over the two fields; a receiver uses this checksum to detect damaged fields."""
        return int.from_bytes(hashlib.sha256(f"{self.checksum} {self.gain}".encode()).digest()[:8], "little")
