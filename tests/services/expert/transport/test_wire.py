"""These tests convert arrays to messages and back, and check that invalid messages are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.checksum import checksum_of_reply
from services.expert.transport.wire import Refused, picks_from_proto, sums_from_proto, sums_to_proto
from tests.services.expert.checkpoint import LATENT, NUM_EXPERTS
from tests.services.expert.requests import body_of, make_request


def signed(sums: pb.Sums) -> pb.ComputeReply:
    reply = pb.ComputeReply(id=3, sums=sums, compute_us=5)
    reply.checksum = checksum_of_reply(reply)
    return reply


@pytest.mark.parametrize(("largest", "width"), [(2**31 - 1, 4), (2**31, 8), (2**62, 8)])
def test_sums_come_back_as_they_were(largest: int, width: int) -> None:
    sums_NL = np.array([[0, -5, largest], [7, 1, -largest]])
    packed = sums_to_proto(sums_NL)
    assert packed.width == width
    assert np.array_equal(sums_from_proto(signed(packed), 2, 3), sums_NL)


def test_sums_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(ValueError, match="12 bytes of width 4 where 2 × 3 sums"):
        sums_from_proto(signed(pb.Sums(data=bytes(12), width=4)), 2, 3)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"dtype": 0}, "dtype is 0, but must be DTYPE_BF16 or DTYPE_FP32."),
        ({"rows": b""}, f"rows has 0 bytes, but must hold {LATENT} numbers of 4, and not be empty."),
        ({"num_rows": 2}, f"rows has {4 * LATENT} bytes, but must hold {2 * LATENT} numbers of 4"),
        ({"grid": b"1"}, "grid has 1 bytes"),
        ({"pick_rows": b""}, "pick_weights has 8 bytes, but must hold 0 numbers"),
        ({"pick_weights": bytes(4)}, "pick_weights has 4 bytes, but must hold 2 numbers"),
        ({"pick_rows": b"\1\0\0\0\0\0\0\0"}, "pick_rows runs from 0 to 1, but must stay within 0 to 0."),
        (
            {"pick_experts": b"\xff\xff\xff\xff\0\0\0\0"},
            "pick_experts runs from -1 to 0, but must stay within 0 to 31",
        ),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(changes: dict[str, Any], detail: str) -> None:
    request = make_request(**changes)
    with pytest.raises(Refused) as refused:
        picks_from_proto(request, body_of(request), LATENT, NUM_EXPERTS)
    assert refused.value.code == pb.Refusal.BAD_SHAPE
    assert detail in refused.value.detail
