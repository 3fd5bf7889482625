"""The oracles compute the layers slowly and plainly in float64.

The oracles are written from the equations in the papers that the blocks name, and share no code with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def dequantized(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return the exact fp32 weight of a module from the tensors of a checkpoint, column by column or block by block."""
    weight = tensors[f"{module}.weight"]
    if f"{module}.weight_scale_inv" in tensors:
        grid, out = tensors[f"{module}.weight_scale_inv"], weight.float()
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                out[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= grid[i, j]
        return out
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * tensors[f"{module}.weight_scale"]
    assert weight.dtype == torch.uint8
    columns = []
    for c in range(2 * weight.shape[1]):
        code = weight[:, c // 2].int() >> (0 if c % 2 == 0 else 4) & 15
        exponent, half, sign = (code >> 1 & 3).float(), (code & 1) / 2, 1 - 2 * (code >> 3)
        value = sign * torch.where(exponent == 0, half, (1 + half) * 2 ** (exponent - 1))
        scale = tensors[f"{module}.weight_scale"][:, c // 16].float() * tensors[f"{module}.weight_scale_2"]
        columns.append(value * scale)
    return torch.stack(columns, 1)


def recurrence(
    x_LHD: Tensor, delta_LH: Tensor, a_H: Tensor, b_LGN: Tensor, c_LGN: Tensor, state_HDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute S ← exp(ΔA)·S + Δ·x⊗B and y = S·C token by token and head by head; return all y and the last S."""
    x, delta, a, b, c = (v.double() for v in (x_LHD, delta_LH, a_H, b_LGN, c_LGN))
    state = state_HDN.double().clone()
    num_heads, per_group = x.shape[1], x.shape[1] // b.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for h in range(num_heads):
            g = h // per_group
            state[h] = (delta[t, h] * a[h]).exp() * state[h] + delta[t, h] * torch.outer(x[t, h], b[t, g])
            y[t, h] = state[h] @ c[t, g]
    return y, state


def convolution(xbc_LC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, past_KC: Tensor) -> tuple[Tensor, Tensor]:
    """Return out[t] = SiLU(bias + Σ_k weight[k]·in[t - (K-1) + k]) for each token, and the last K-1 inputs."""
    columns = torch.cat([past_KC, xbc_LC]).double()
    num_taps = weight_CK.shape[1]
    rows = []
    for t in range(xbc_LC.shape[0]):
        total = sum((weight_CK[:, k].double() * columns[t + k] for k in range(num_taps)), start=torch.zeros(()))
        total = total if bias_C is None else total + bias_C.double()
        rows.append(total * total.sigmoid())
    return torch.stack(rows), columns[len(columns) - (num_taps - 1) :]


def attention(q_THD: Tensor, k_LJD: Tensor, v_LJD: Tensor) -> Tensor:
    """Compute attention head by head for a request's last T tokens; each token attends to all tokens up to itself."""
    q, k, v = q_THD.double(), k_LJD.double(), v_LJD.double()
    per_kv_head, first = q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
    out = torch.zeros_like(q)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            j, seen = h // per_kv_head, first + t + 1
            scores = k[:seen, j] @ q[t, h] / q.shape[2] ** 0.5
            out[t, h] = scores.softmax(0) @ v[:seen, j]
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def relu2_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x.double() @ up.double().T).clamp(min=0).square() @ down.double().T


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gates = x.double() @ gate.double().T
    return (gates / (1 + torch.exp(-gates)) * (x.double() @ up.double().T)) @ down.double().T


def expert(x: Tensor, matrices: dict[str, Tensor]) -> Tensor:
    """Return the output of an expert with the matrices up and down (relu²), or gate, up and down (SwiGLU)."""
    return swiglu_mlp(x, **matrices) if "gate" in matrices else relu2_mlp(x, **matrices)


def weighted_experts(
    x_NL: Tensor, row_P: Tensor, expert_P: Tensor, weight_P: Tensor, experts: dict[int, dict[str, Tensor]]
) -> Tensor:
    """Return, for each row, the sum of weight·expert(x[row]) over the row's picks, added pick by pick."""
    out = torch.zeros(x_NL.shape, dtype=torch.float64)
    for row, id, weight in zip(row_P.tolist(), expert_P.tolist(), weight_P.double(), strict=True):
        out[row] += weight * expert(x_NL[row], experts[id])
    return out


def moe(h: Tensor, tensors: dict[str, Tensor], prefix: str, raw: dict[str, Any]) -> Tensor:
    """Compute LatentMoE: sigmoid scores, top-k of score + bias, normalised and scaled weights, experts on latents."""

    def weight(name: str) -> Tensor:
        return tensors[f"{prefix}.{name}.weight"].double()

    scores = (h @ weight("gate").T).sigmoid()
    chosen = (
        (scores + tensors[f"{prefix}.gate.e_score_correction_bias"].double()).topk(raw["num_experts_per_tok"]).indices
    )
    z = h @ weight("fc1_latent_proj").T
    rows = []
    for t in range(h.shape[0]):
        weights = scores[t, chosen[t]] / (scores[t, chosen[t]].sum() + 1e-20) * raw["routed_scaling_factor"]
        outputs = [
            w * relu2_mlp(z[t], weight(f"experts.{e}.up_proj"), weight(f"experts.{e}.down_proj"))
            for w, e in zip(weights, chosen[t].tolist(), strict=True)
        ]
        rows.append(torch.stack(outputs).sum(0))
    shared = relu2_mlp(h, weight("shared_experts.up_proj"), weight("shared_experts.down_proj"))
    return torch.stack(rows) @ weight("fc2_latent_proj").T + shared


def draft(tensors: dict[str, Tensor], raw: dict[str, Any], hidden_LD: Tensor, next_ids: list[int]) -> Tensor:
    """Run the MTP module over a request: hidden vector g_t and token x_{t+1} give o_t, whose logits predict x_{t+2}."""

    def weight(name: str) -> Tensor:
        return tensors[f"mtp.layers.{name}.weight"].double()

    embedded = tensors["backbone.embeddings.weight"][next_ids]
    halves = [rms_norm(embedded, weight("0.enorm")), rms_norm(hidden_LD, weight("0.hnorm"))]
    f = torch.cat(halves, dim=-1) @ weight("0.eh_proj").T
    h = rms_norm(f, weight("0.norm"))
    q, k, v = ((h @ weight(f"0.mixer.{n}_proj").T).unflatten(-1, (-1, raw["head_dim"])) for n in "qkv")
    f = f + attention(q, k, v).flatten(1) @ weight("0.mixer.o_proj").T
    f = f + moe(rms_norm(f, weight("1.norm")), tensors, "mtp.layers.1.mixer", raw)
    return rms_norm(f, weight("1.final_layernorm"))
