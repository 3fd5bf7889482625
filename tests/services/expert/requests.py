"""`make_request` returns small compute requests for tests that call a shard without `RemoteExperts`."""

from __future__ import annotations

from typing import Any

import numpy as np

from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.wire import body_of, checksum_of_request
from tests.services.expert.checkpoint import LATENT


def make_request(experts: tuple[int, ...] = (0, 1), **changes: Any) -> pb.ComputeRequest:
    """Return a request with one row that picks `experts` with weight 1. `changes` replace fields of the request."""
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
    request.checksum = checksum_of_request(request, body_of(request))
    return request
