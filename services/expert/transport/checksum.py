"""Checksums of messages: what was changed on the way, by whatever, is not computed with.

CRC-32 (as in zlib) of the numbers in the order of the struct, little-endian, and then of the bytes fields in the order
of their numbers in the .proto file; of a refusal, of its `detail` in UTF-8 and its `missing` as 32-bit numbers.
"""

from __future__ import annotations

import struct
from zlib import crc32

from protos.expertmesh.expert.v1 import expert_pb2 as pb

REQUEST = struct.Struct("<QIQIIQ")  # id, layer, epoch, num_rows, dtype, timeout_us
SUMS = struct.Struct("<QQQII")  # id, queue_us, compute_us, queue_depth, width
REFUSAL = struct.Struct("<QQQIIQ")  # id, queue_us, compute_us, queue_depth, code, epoch


def request_checksum(
    head: bytes, rows: bytes, grid: bytes, pick_rows: bytes, pick_experts: bytes, pick_weights: bytes
) -> int:
    """Of a request whose numbers are packed in `head`."""
    picks = pick_rows + pick_experts + pick_weights  # copied sooner than three more calls are made
    return crc32(picks, crc32(grid, crc32(rows, crc32(head))))


def checksum_of_reply(reply: pb.ComputeReply, data: bytes | None = None) -> int:
    """`data`: that of the sums, where it is at hand; each access to it would copy it."""
    numbers = (reply.id, reply.queue_us, reply.compute_us, reply.queue_depth)
    if reply.HasField("sums"):
        return crc32(reply.sums.data if data is None else data, crc32(SUMS.pack(*numbers, reply.sums.width)))
    refusal = reply.refusal
    missing = struct.pack(f"<{len(refusal.missing)}I", *refusal.missing)
    return crc32(missing, crc32(refusal.detail.encode(), crc32(REFUSAL.pack(*numbers, refusal.code, refusal.epoch))))
