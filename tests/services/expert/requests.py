"""Small requests for tests that speak to a shard without `RemoteExperts`."""

from __future__ import annotations

from typing import Any

import numpy as np

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.checksum import REQUEST, request_checksum
from services.expert.wire import Body
from tests.services.expert.checkpoint import LATENT


def make_request(experts: tuple[int, ...] = (0, 1), **changes: Any) -> pb.ComputeRequest:
    """One row, sent to `experts` with weight 1."""
    fields = {
        "id": 1,
        "layer": 1,
        "epoch": 1,
        "num_rows": 1,
        "dtype": pb.DTYPE_FP32,
        "rows": np.ones(LATENT, "<f4").tobytes(),
        "grid": np.array([-20], "<i2").tobytes(),
        "pick_rows": np.zeros(len(experts), "<i4").tobytes(),
        "pick_experts": np.array(experts, "<i4").tobytes(),
        "pick_weights": np.ones(len(experts), "<f4").tobytes(),
    }
    request = pb.ComputeRequest(**{**fields, **changes})
    numbers = (request.id, request.layer, request.epoch, request.num_rows, request.dtype, request.timeout_us)
    request.checksum = request_checksum(REQUEST.pack(*numbers), *body_of(request))
    return request


def body_of(request: pb.ComputeRequest) -> Body:
    return Body(request.rows, request.grid, request.pick_rows, request.pick_experts, request.pick_weights)
