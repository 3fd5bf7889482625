"""`causal_conv` calls the fused CUDA kernels of causal-conv1d.

The function has the signature of `model.blocks.mamba.causal_conv`. The module is imported only on CUDA, by
`model.kernels`. What surprises: the package does not accept past inputs for each request of a packed batch. Therefore
the function puts each request's past inputs before the request's new inputs.

Legend: as in `model.blocks.mamba`; S the rows of the padded input.
Source: causal-conv1d 1.5, `causal_conv1d_interface.py`.
"""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from torch import Tensor

from model.state import Batch


def causal_conv(
    xbc_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, window_RKC: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Compute `model.blocks.mamba.causal_conv` and return the outputs (T, C) and the last K-1 inputs (R, K-1, C).

    The kernel requires C to be a multiple of 8.
    """
    weight_CK = weight_CK.contiguous()
    if max(batch.lens) == 1:
        # The kernel overwrites the window of past inputs, so the function passes a copy of the window.
        window_RCK = window_RKC.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        out_TC: Tensor = causal_conv1d_update(xbc_TC, window_RCK, weight_CK, bias_C, activation="silu")
        return out_TC, window_RCK.transpose(1, 2)
    num_past = window_RKC.shape[1]
    lens_R = torch.tensor(batch.lens, device=xbc_TC.device)
    parts = zip(window_RKC.unbind(), xbc_TC.split(list(batch.lens)), strict=True)
    padded_SC = torch.cat([part for pair in parts for part in pair])
    request_S = torch.arange(len(batch.lens), device=xbc_TC.device).repeat_interleave(lens_R + num_past)
    out_SC = causal_conv1d_fn(padded_SC.t()[None], weight_CK, bias_C, seq_idx=request_S.int()[None], activation="silu")[
        0
    ].t()
    ends_R = (lens_R + num_past).cumsum(0)
    shift_T = (torch.arange(len(batch.lens), device=xbc_TC.device) + 1).repeat_interleave(lens_R) * num_past
    last_RK = ends_R[:, None] + torch.arange(-num_past, 0, device=xbc_TC.device)
    return out_SC[torch.arange(xbc_TC.shape[0], device=xbc_TC.device) + shift_T], padded_SC[last_RK]
