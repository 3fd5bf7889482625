"""`Weights` are one routed expert's weights on their way between disk, host memory, peers and the device.

The checksum is the first 8 bytes of SHA-256 over the stored bytes: the names of the formats if a matrix is quantized,
then each matrix in the order of `ExpertShape.matrices`, its codes before its scales, row by row, little-endian. Plain
matrices are hashed in the dtype that the shard computes in. So the checksum does not depend on where the bytes came
from. For an expert of 11 MB in bf16, the checksum takes 10 ms (measured). CRC-32 takes 7 ms, but has only 32 bits to
tell experts apart; BLAKE2b takes 22 ms. For comparison, packing the expert takes 25 ms and finding its gain exponent
70 ms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from model.configs.expert_shape import ExpertShape
from model.configs.weight_format import WeightFormat
from model.exact_sums import gain_exponent
from model.stored_matrix import StoredMatrix, matrix_from_bytes
from protos.expertmesh.expert.v1 import expert_pb2 as pb

CHUNK_BYTES = 512 << 10  # maximum bytes of weights in one message to a peer
PLAIN_FORMATS = {torch.bfloat16: pb.STORED_FORMAT_BF16, torch.float32: pb.STORED_FORMAT_FP32}
QUANTIZED_FORMATS: dict[WeightFormat, pb.StoredFormat] = {
    "fp8": pb.STORED_FORMAT_FP8,
    "fp8_blocks": pb.STORED_FORMAT_FP8_BLOCKS,
    "nvfp4": pb.STORED_FORMAT_NVFP4,
}


def matrix_formats(shape: ExpertShape, dtype: torch.dtype) -> list[pb.MatrixFormat]:
    """Return how a shard that computes in `dtype` stores and sends the matrices of the experts of `shape`, in order."""
    return [
        pb.MatrixFormat(
            name=matrix.name,
            rows=matrix.rows,
            columns=matrix.columns,
            format=PLAIN_FORMATS[dtype] if matrix.format == "plain" else QUANTIZED_FORMATS[matrix.format],
        )
        for matrix in shape.matrices
    ]


def describe_formats(matrices: Iterable[pb.MatrixFormat]) -> str:
    """Return a text for an error message, for example "up FP8 64x32, down BF16 32x64"."""

    def name(format: pb.StoredFormat) -> str:
        return pb.StoredFormat.Name(format).removeprefix("STORED_FORMAT_")

    return ", ".join(f"{of.name} {name(of.format)} {of.rows}x{of.columns}" for of in matrices) or "no matrices"


@dataclass(frozen=True)
class Weights:
    """`Weights` are one expert's matrices by name, in the order of `ExpertShape.matrices`.

    The matrices are contiguous and on the CPU. Plain matrices have the dtype that the shard computes in.
    """

    matrices: Mapping[str, StoredMatrix]
    gain: int | None = None  # the gain exponent, if it has been found already

    @classmethod
    def of(cls, matrices: Mapping[str, StoredMatrix], dtype: torch.dtype) -> Weights:
        """Return weights made of the matrices of a checkpoint or an `ExpertBank`; plain ones are converted to `dtype`.

        `matrices` must be in the order of `ExpertShape.matrices`.
        """
        return cls({name: matrix.to("cpu", dtype) for name, matrix in matrices.items()})

    @classmethod
    def from_bytes(cls, data: bytearray, shape: ExpertShape, dtype: torch.dtype, gain: int | None = None) -> Weights:
        """Return the weights whose bytes are `data` (the joined `chunks`); the matrices share the memory of `data`."""
        assert len(data) == shape.nbytes(dtype)
        matrices, view = {}, memoryview(data)
        for matrix in shape.matrices:
            num_bytes = matrix.nbytes(dtype)
            sizes = (matrix.rows, matrix.columns)
            matrices[matrix.name] = matrix_from_bytes(view[:num_bytes], matrix.format, sizes, dtype)
            view = view[num_bytes:]
        return cls(matrices, gain)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values())

    @property
    def part_sizes(self) -> list[int]:
        """Return the bytes of each of the tensors that store the expert, in order."""
        return [part.nbytes for matrix in self.matrices.values() for part in matrix.parts]

    @cached_property
    def checksum(self) -> int:
        """Return the checksum that the manifest records for these weights; the first access hashes all bytes."""
        digest = hashlib.sha256()
        if formats := [matrix.format for matrix in self.matrices.values() if matrix.format != "plain"]:
            digest.update(" ".join(formats).encode())
        for view in self._views():
            digest.update(view)
        return int.from_bytes(digest.digest()[:8], "little")

    def gain_exponent(self) -> int:
        """Return the gain exponent that an `ExpertBank` finds when it loads the expert."""
        return gain_exponent(self.matrices) if self.gain is None else self.gain

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes of all matrices in order, in pieces of at most CHUNK_BYTES."""
        for view in self._views():
            for start in range(0, len(view), CHUNK_BYTES):
                yield view[start : start + CHUNK_BYTES]

    def _views(self) -> list[memoryview]:
        return [view for matrix in self.matrices.values() for view in matrix.views()]

    def in_host_memory(self) -> Weights:
        """Return a copy in ordinary host memory; the original may be mapped from the checkpoint's file."""

        def copied(matrix: StoredMatrix) -> StoredMatrix:
            return StoredMatrix(matrix.format, tuple(part.clone() for part in matrix.parts))

        return Weights({name: copied(matrix) for name, matrix in self.matrices.items()}, self.gain)


@dataclass(frozen=True)
class ExpertMetadata:
    """`ExpertMetadata` holds the checksum and the gain exponent of an expert, which are found during a load."""

    checksum: int
    gain: int

    @property
    def seal(self) -> int:
        """Return a checksum over the two fields; a receiver uses this checksum to detect damaged fields."""
        return int.from_bytes(hashlib.sha256(f"{self.checksum} {self.gain}".encode()).digest()[:8], "little")
