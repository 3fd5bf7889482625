"""The functions of this module convert arrays to messages and back, for both ends of `Expert.Compute`.

Legend: N rows of the message, P picks of the message, ℓ numbers per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.checksum import REQUEST, checksum_of_reply, request_checksum
from services.expert.transport.dispatch_combine import narrow

COMPUTE_PATH = f"/{pb.DESCRIPTOR.services_by_name['Expert'].full_name}/Compute"
TORCH_DTYPES = {pb.DTYPE_BF16: torch.bfloat16, pb.DTYPE_FP32: torch.float32}
WIRE_DTYPES = {dtype: wire for wire, dtype in TORCH_DTYPES.items()}

CORRUPT_REPLY = "its reply was changed on the way, because its checksum is wrong"

Ints = NDArray[np.integer]


class Refused(Exception):
    """A `Refused` error says why this shard does not compute a request; the client gets it as a `Refusal`."""

    def __init__(self, code: pb.Refusal.Code, detail: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(detail)
        self.code, self.detail, self.missing = code, detail, missing


@dataclass(frozen=True, slots=True)
class Picks:
    """`Picks` are the decoded body of a request: rows of one layer with their experts and weights, read-only."""

    x_NL: NDArray[np.generic]  # fp32 numbers, or the bits of bf16 numbers as int16
    grid_N: NDArray[np.int16]
    row_P: NDArray[np.int32]
    expert_P: NDArray[np.int32]
    weight_P: NDArray[np.float32]

    def only(self, is_chosen_P: NDArray[np.bool_]) -> Picks:
        """Return the chosen picks with all rows; the arrays are read-only, as the compiled kernels require."""
        row_P, expert_P, weight_P = self.row_P[is_chosen_P], self.expert_P[is_chosen_P], self.weight_P[is_chosen_P]
        row_P.setflags(write=False)
        expert_P.setflags(write=False)
        weight_P.setflags(write=False)
        return Picks(self.x_NL, self.grid_N, row_P, expert_P, weight_P)


def rows_as_numpy(x_NL: Tensor) -> NDArray[np.generic]:
    """Return bf16 or fp32 rows (N, ℓ) as a numpy array; bf16 becomes int16 with the same bits, as numpy has no bf16.

    Raise ValueError for any other dtype.
    """
    if x_NL.dtype not in WIRE_DTYPES:
        raise ValueError(f"Rows travel as float32 or bfloat16, not as {x_NL.dtype}.")
    x_NL = x_NL.cpu().contiguous()
    return (x_NL.view(torch.int16) if x_NL.dtype == torch.bfloat16 else x_NL).numpy()


class ComputeBody(NamedTuple):
    """A `ComputeBody` holds the arrays of a request, because each access to a field of the message would copy it."""

    rows: bytes
    grid: bytes
    pick_rows: bytes
    pick_experts: bytes
    pick_weights: bytes


def body_of(request: pb.ComputeRequest) -> ComputeBody:
    return ComputeBody(request.rows, request.grid, request.pick_rows, request.pick_experts, request.pick_weights)


def checksum_of_request(request: pb.ComputeRequest, body: ComputeBody) -> int:
    numbers = (request.id, request.layer, request.epoch, request.num_rows, request.dtype, request.timeout_us)
    return request_checksum(REQUEST.pack(*numbers), *body)


def encode_request(
    numbers: tuple[int, int, int, int, pb.Dtype, int], rows: bytes, grid: bytes, picked: tuple[bytes, bytes, bytes]
) -> bytes:
    """Return the message of a request, with its checksum.

    numbers: id, layer, epoch, number of rows, dtype and timeout in µs, in the order of `checksum.REQUEST`.
    picked: the row in the message, the expert and the weight of each pick, as three arrays of bytes.
    """
    id, layer, epoch, num_rows, dtype, timeout_us = numbers
    pick_rows, pick_experts, pick_weights = picked
    return pb.ComputeRequest(
        id=id,
        layer=layer,
        epoch=epoch,
        num_rows=num_rows,
        dtype=dtype,
        rows=rows,
        grid=grid,
        pick_rows=pick_rows,
        pick_experts=pick_experts,
        pick_weights=pick_weights,
        timeout_us=timeout_us,
        checksum=request_checksum(REQUEST.pack(*numbers), rows, grid, pick_rows, pick_experts, pick_weights),
    ).SerializeToString()


def checked_body(request: pb.ComputeRequest) -> ComputeBody:
    """Return the arrays of a request; raise Refused with CORRUPT if the request was changed on the way."""
    body = body_of(request)
    checksum = checksum_of_request(request, body)
    if checksum != request.checksum:
        detail = "The request was changed on its way, or its sender computes no checksum"
        numbers = f"its checksum is {request.checksum:#x}, but must be {checksum:#x}"
        raise Refused(pb.Refusal.CORRUPT, f"{detail}: {numbers}.")
    return body


def picks_from_proto(request: pb.ComputeRequest, body: ComputeBody, input_dim: int, num_experts: int) -> Picks:
    """Decode a request; raise Refused with BAD_SHAPE if the request contradicts `input_dim` or `num_experts`."""
    dtype = TORCH_DTYPES.get(request.dtype)
    if dtype is None:
        raise Refused(pb.Refusal.BAD_SHAPE, f"dtype is {request.dtype}, but must be DTYPE_BF16 or DTYPE_FP32.")
    num_rows, pick_rows = request.num_rows, body.pick_rows
    num_picks = len(pick_rows) // 4
    rows = _sized("rows", body.rows, num_rows * input_dim, dtype.itemsize)
    grid = _sized("grid", body.grid, num_rows, 2)
    weights = _sized("pick_weights", body.pick_weights, num_picks, 4)
    return Picks(
        np.frombuffer(rows, dtype="<i2" if dtype == torch.bfloat16 else "<f4").reshape(num_rows, input_dim),
        np.frombuffer(grid, dtype="<i2"),
        _ids("pick_rows", pick_rows, num_picks, num_rows),
        _ids("pick_experts", body.pick_experts, num_picks, num_experts),
        np.frombuffer(weights, dtype="<f4"),
    )


def _sized(name: str, data: bytes, num_numbers: int, width: int) -> bytes:
    if len(data) != num_numbers * width or not data:
        detail = f"{name} has {len(data)} bytes, but must hold {num_numbers} numbers of {width}, and not be empty."
        raise Refused(pb.Refusal.BAD_SHAPE, detail)
    return data


def _ids(name: str, data: bytes, num_ids: int, end: int) -> NDArray[np.int32]:
    ids = np.frombuffer(_sized(name, data, num_ids, 4), dtype="<i4")
    if ids.view(np.uint32).max() >= end:  # as unsigned numbers, negative ids are large
        bounds = f"from {ids.min()} to {ids.max()}, but must stay within 0 to {end - 1}"
        raise Refused(pb.Refusal.BAD_SHAPE, f"{name} runs {bounds}.")
    return ids


def sums_to_proto(sums: NDArray[np.int64]) -> pb.Sums:
    """Pack int64 sums (N, ℓ) into 4 bytes each if all sums fit, else into 8 bytes each."""
    half = np.empty(sums.shape, np.int32)
    if narrow(sums, half):
        return pb.Sums(data=half.tobytes(), width=4)
    return pb.Sums(data=sums.tobytes(), width=8)


def sums_from_proto(reply: pb.ComputeReply, num_rows: int, input_dim: int) -> Ints:
    """Return the sums of a reply, int32 or int64 (N, ℓ), read-only.

    Raise ValueError if the size is wrong or if the reply was changed on the way.
    """
    sums = reply.sums
    data, width = sums.data, sums.width
    if checksum_of_reply(reply, data) != reply.checksum:
        raise ValueError(CORRUPT_REPLY)
    if width not in (4, 8) or len(data) != num_rows * input_dim * width:
        expected = f"{num_rows} × {input_dim} sums of 4 or 8 bytes"
        raise ValueError(f"A shard answered {len(data)} bytes of width {width} where {expected} were expected.")
    return np.frombuffer(data, dtype=f"<i{width}").reshape(num_rows, input_dim)
