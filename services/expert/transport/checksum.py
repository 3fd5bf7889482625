"""Every message carries a checksum, so that nothing is computed with data that was changed on the way.

A checksum is the CRC-32 (as in zlib) of these bytes, one after the other:

1. the numbers of the message, little-endian, in the order of `REQUEST`, `SUMS` or `REFUSAL` below; 2. for a request or
for sums, the bytes fields in the order of the field numbers in the .proto file; 3. for a refusal, its `detail` in UTF-8
and its `missing` as 32-bit numbers.
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
    """Return the checksum of a request whose numbers are packed in `head`."""
    picks = pick_rows + pick_experts + pick_weights  # one copy takes less time than two more calls of crc32
    return crc32(picks, crc32(grid, crc32(rows, crc32(head))))


def checksum_of_reply(reply: pb.ComputeReply, data: bytes | None = None) -> int:
    """Return the checksum of a reply.

    Each access to the field `sums.data` copies the bytes of the field. So a caller that has already read the field
    passes the bytes as `data`.
    """
    numbers = (reply.id, reply.queue_us, reply.compute_us, reply.queue_depth)
    if reply.HasField("sums"):
        return crc32(reply.sums.data if data is None else data, crc32(SUMS.pack(*numbers, reply.sums.width)))
    refusal = reply.refusal
    missing = struct.pack(f"<{len(refusal.missing)}I", *refusal.missing)
    return crc32(missing, crc32(refusal.detail.encode(), crc32(REFUSAL.pack(*numbers, refusal.code, refusal.epoch))))
