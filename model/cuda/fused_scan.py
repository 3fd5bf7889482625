"""The functions here call the fused Triton kernels of mamba-ssm.

Each function has the signature of a function in `model.blocks.mamba`. The module is imported only on CUDA, by
`model.kernels`.
What surprises:

- The scan does not accept an initial state for each request of a packed batch. Therefore `ssd_scan` pads the requests
  into a rectangle.
- Softplus is already applied to Δ, so the kernels must not apply softplus again.
- Matrix products inside the scan use TF32 if x is fp32.

Legend: as in `model.blocks.mamba`; L the rectangle's length.
Source: mamba-ssm 2.2 and 2.3, `ops/triton/{ssd_combined,selective_state_update}.py`.
"""

from __future__ import annotations

import torch
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from model.state import SubBatch


def ssd_scan(
    x_THD: Tensor,
    delta_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    ssm_RHDN: Tensor,
    sub_batch: SubBatch,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute `model.blocks.mamba.packed_scan` and return y (T, H, D) and the final states (R, H, D, N)."""
    request_T, column_T = rectangle(sub_batch, chunk_size, x_THD.device)
    shape_RL = len(sub_batch.lens), int(column_T.max()) + 1

    def pad(v: Tensor) -> Tensor:
        return v.new_zeros(*shape_RL, *v.shape[1:]).index_put_((request_T, column_T), v)

    y_RLHD, final_RHDN = mamba_chunk_scan_combined(
        pad(x_THD),
        pad(delta_TH),
        a_H,
        pad(b_TGN),
        pad(c_TGN),
        chunk_size,
        initial_states=ssm_RHDN.contiguous(),
        dt_softplus=False,
        return_final_states=True,
    )
    return y_RLHD[request_T, column_T], final_RHDN.to(ssm_RHDN.dtype)


def rectangle(sub_batch: SubBatch, chunk_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each packed row's coordinates in the rectangle: the request (T,) and the column (T,).

    A request's first token gets the column (token's position) mod (chunk length). So chunks end at positions that are
    multiples of the chunk length, as in `model.blocks.mamba.split_into_chunks`. The columns before the first token are
    padding with Δ = 0, which does not change the state.
    """
    firsts_R = torch.tensor([context_len % chunk_size for context_len in sub_batch.context_lens], device=device)
    lens_R = torch.tensor(sub_batch.lens, device=device)
    request_T = torch.arange(len(sub_batch.lens), device=device).repeat_interleave(lens_R)
    starts_R = lens_R.cumsum(0) - lens_R
    return request_T, torch.arange(len(request_T), device=device) + (firsts_R - starts_R)[request_T]


def ssd_step(
    x_RHD: Tensor, delta_RH: Tensor, a_H: Tensor, b_RGN: Tensor, c_RGN: Tensor, state_RHDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `model.blocks.mamba.ssd_step` and return y (R, H, D) and the new states (R, H, D, N), as new tensors."""
    _, head_dim, state_dim = state_RHDN.shape[1:]
    state_RHDN = state_RHDN.clone()  # the kernel overwrites the state
    # Expanded strides select the kernel's path for scalar decay. The path reads the strides of dt_bias and D, so that
    # None would raise an error. The caller adds the skip term D·x, so D is 0 here.
    zeros_HD = torch.zeros_like(a_H)[:, None].expand(-1, head_dim)
    y_RHD: Tensor = selective_state_update(
        state_RHDN,
        x_RHD,
        delta_RH[..., None].expand(-1, -1, head_dim),
        a_H[:, None, None].expand(-1, head_dim, state_dim),
        b_RGN,
        c_RGN,
        zeros_HD,
        dt_bias=zeros_HD,
        dt_softplus=False,
    )
    return y_RHD, state_RHDN
