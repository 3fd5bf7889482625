"""`logits` and `drafts` compute a Qwen3-Next model slowly and plainly in float64, from the tensors of a checkpoint.

The functions follow the equations of the papers and share no code with the model. Every token is computed from all
tokens before it, and every head, expert and state is computed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.model.oracles import attention, convolution, swiglu_mlp

Tensors = Mapping[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root of the mean square, and multiply by 1 + weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + weight.double())


def delta_rule(
    q_LHD: Tensor, k_LHD: Tensor, v_LHV: Tensor, decay_LH: Tensor, beta_LH: Tensor, state_HVD: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute S ← decay·S, S ← S + β·(v - S·k)⊗k and o = S·q token by token and head by head.

    Returns o and the last S.
    """
    q, k, v, decay, beta = (x.double() for x in (q_LHD, k_LHD, v_LHV, decay_LH, beta_LH))
    state, out = state_HVD.double().clone(), torch.zeros_like(v)
    for t in range(v.shape[0]):
        for h in range(v.shape[1]):
            kept = decay[t, h] * state[h]
            state[h] = kept + beta[t, h] * torch.outer(v[t, h] - kept @ k[t, h], k[t, h])
            out[t, h] = state[h] @ q[t, h]
    return out, state


def delta_net(h: Tensor, tensors: Tensors, place: str, raw: Mapping[str, Any]) -> Tensor:
    """Compute a DeltaNet layer for a whole sequence (L, D), from the rows of each key head in the two projections."""

    def weight(name: str) -> Tensor:
        return tensors[f"{place}.{name}"].double()

    num_keys, num_values = raw["linear_num_key_heads"], raw["linear_num_value_heads"]
    key_dim, value_dim, each = raw["linear_key_head_dim"], raw["linear_value_head_dim"], num_values // num_keys
    qkvz, ba = h @ weight("in_proj_qkvz.weight").T, h @ weight("in_proj_ba.weight").T
    queries, keys, values, gates, betas, decays = [], [], [], [], [], []
    for j in range(num_keys):
        columns = qkvz[:, j * qkvz.shape[1] // num_keys : (j + 1) * qkvz.shape[1] // num_keys]
        q, k, v, z = columns.split([key_dim, key_dim, each * value_dim, each * value_dim], dim=1)
        b, a = ba[:, 2 * j * each : 2 * (j + 1) * each].chunk(2, dim=1)
        for found, part in zip((queries, keys, values, gates, betas, decays), (q, k, v, z, b, a), strict=True):
            found.append(part)
    inputs = torch.cat([*queries, *keys, *values], dim=1)
    past = torch.zeros(raw["linear_conv_kernel_dim"] - 1, inputs.shape[1])
    mixed, _ = convolution(inputs, weight("conv1d.weight")[:, 0], None, past)
    q, k, v = mixed.split([num_keys * key_dim, num_keys * key_dim, num_values * value_dim], dim=1)
    q, k = (x.unflatten(1, (num_keys, key_dim)) for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    of_head = [head // each for head in range(num_values)]
    beta = torch.cat(betas, dim=1).sigmoid()
    step = torch.cat(decays, dim=1) + weight("dt_bias")
    decay = (-weight("A_log").exp() * step.exp().log1p()).exp()
    state = torch.zeros(num_values, value_dim, key_dim)
    o, _ = delta_rule(q[:, of_head] / key_dim**0.5, k[:, of_head], v.unflatten(1, (num_values, -1)), decay, beta, state)
    o = o / (o.square().mean(-1, keepdim=True) + raw["rms_norm_eps"]).sqrt() * weight("norm.weight")
    z = torch.cat(gates, dim=1).unflatten(1, (num_values, -1))
    return (o * z * z.sigmoid()).flatten(1) @ weight("out_proj.weight").T


def rotated(x_LHD: Tensor, first_position: int, dim: int, theta: float) -> Tensor:
    """Rotate the pairs (i, i + dim/2) of the first `dim` numbers by position·θ^(-2i/dim)."""
    out = x_LHD.clone()
    for t in range(x_LHD.shape[0]):
        for i in range(dim // 2):
            angle = torch.tensor((first_position + t) * theta ** (-2 * i / dim), dtype=torch.float64)
            a, b = x_LHD[t, :, i], x_LHD[t, :, i + dim // 2]
            out[t, :, i] = a * angle.cos() - b * angle.sin()
            out[t, :, i + dim // 2] = b * angle.cos() + a * angle.sin()
    return out


def gated_attention(
    h: Tensor, tensors: Tensors, place: str, raw: Mapping[str, Any], theta: float, share: float, first_position: int
) -> Tensor:
    def weight(name: str) -> Tensor:
        return tensors[f"{place}.{name}.weight"].double()

    dim, eps = raw["head_dim"], raw["rms_norm_eps"]
    q_and_gate = (h @ weight("q_proj").T).unflatten(1, (raw["num_attention_heads"], 2 * dim))
    k, v = ((h @ weight(f"{name}_proj").T).unflatten(1, (-1, dim)) for name in "kv")
    num_rotated = int(dim * share)
    q = rotated(norm(q_and_gate[..., :dim], weight("q_norm"), eps), first_position, num_rotated, theta)
    k = rotated(norm(k, weight("k_norm"), eps), first_position, num_rotated, theta)
    out = attention(q, k, v) * q_and_gate[..., dim:].sigmoid()
    return out.flatten(1) @ weight("o_proj").T


def mlp(h: Tensor, tensors: Tensors, place: str) -> Tensor:
    matrices = [tensors[f"{place}.{name}_proj.weight"] for name in ("gate", "up", "down")]
    return swiglu_mlp(h, *matrices)


def moe(h: Tensor, tensors: Tensors, place: str, raw: Mapping[str, Any]) -> Tensor:
    """Compute the softmax over all experts, the best experts of each token, and the gated shared expert."""
    scores = (h @ tensors[f"{place}.gate.weight"].double().T).softmax(-1)
    rows = []
    for t in range(len(h)):
        best = scores[t].topk(raw["num_experts_per_tok"])
        weights = best.values / best.values.sum() if raw.get("norm_topk_prob", True) else best.values
        outputs = [
            w * mlp(h[t], tensors, f"{place}.experts.{e}") for w, e in zip(weights, best.indices.tolist(), strict=True)
        ]
        rows.append(torch.stack(outputs).sum(0))
    gate = (h @ tensors[f"{place}.shared_expert_gate.weight"].double().T).sigmoid()
    return torch.stack(rows) + gate * mlp(h, tensors, f"{place}.shared_expert")


def layer(
    x: Tensor, tensors: Tensors, place: str, raw: Mapping[str, Any], theta: float, share: float, first_position: int = 0
) -> Tensor:
    """Compute one layer; the tensors that are present tell its kind."""
    h = norm(x, tensors[f"{place}.input_layernorm.weight"], raw["rms_norm_eps"])
    if f"{place}.linear_attn.A_log" in tensors:
        x = x + delta_net(h, tensors, f"{place}.linear_attn", raw)
    else:
        x = x + gated_attention(h, tensors, f"{place}.self_attn", raw, theta, share, first_position)
    h = norm(x, tensors[f"{place}.post_attention_layernorm.weight"], raw["rms_norm_eps"])
    has_experts = f"{place}.mlp.gate.weight" in tensors
    return x + (moe(h, tensors, f"{place}.mlp", raw) if has_experts else mlp(h, tensors, f"{place}.mlp"))


def hidden(tensors: Tensors, raw: Mapping[str, Any], token_ids: Sequence[int], theta: float, share: float) -> Tensor:
    """Return the vectors after the final norm: float64 (L, D)."""
    x = tensors["model.embed_tokens.weight"][list(token_ids)].double()
    for i in range(raw["num_hidden_layers"]):
        x = layer(x, tensors, f"model.layers.{i}", raw, theta, share)
    return norm(x, tensors["model.norm.weight"], raw["rms_norm_eps"])


def logits(tensors: Tensors, raw: Mapping[str, Any], token_ids: Sequence[int], theta: float, share: float) -> Tensor:
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return hidden(tensors, raw, token_ids, theta, share) @ head.double().T


def draft(
    tensors: Tensors, raw: Mapping[str, Any], hidden_LD: Tensor, next_ids: Sequence[int], theta: float, share: float
) -> Tensor:
    """Run the MTP module over a request: the vector g_t and token x_{t+1} give o_t, whose logits predict x_{t+2}."""

    def weight(name: str) -> Tensor:
        return tensors[f"mtp.{name}.weight"].double()

    embedded, eps = tensors["model.embed_tokens.weight"][list(next_ids)].double(), raw["rms_norm_eps"]
    halves = [
        norm(embedded, weight("pre_fc_norm_embedding"), eps),
        norm(hidden_LD.double(), weight("pre_fc_norm_hidden"), eps),
    ]
    x = torch.cat(halves, dim=-1) @ weight("fc").T
    x = layer(x, tensors, "mtp.layers.0", raw, theta, share, first_position=1)
    return norm(x, weight("norm"), eps)
