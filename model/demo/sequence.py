"""The functions here run the model over whole sequences and are differentiable, for training and for measuring.

Legend: B sequences, T tokens of each, D hidden, V vocabulary, N = B·T rows, K picks per row, P = N·K picks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.attention import Attention
from model.blocks.mamba import Mamba2Mixer, ssd_scan
from model.blocks.mixer import ResidualBlock
from model.configs.nemotron_h import NemotronHConfig
from model.families.nemotron_h import NemotronH


class TrainableExperts:
    """`TrainableExperts` implements `Experts` with trainable weights and counts picks for the router's balancing.

    `weights[layer]` is (up (E, M, L), down (E, L, M)). The class is not an `nn.Module`, because the experts' weights
    would then become parameters of the backbone.
    """

    def __init__(self, config: NemotronHConfig, device: str) -> None:
        self.weights: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self.counts: dict[int, Tensor] = {}
        for shape in config.expert_shapes:
            up = torch.randn(shape.num_experts, shape.width, shape.input_dim) / shape.input_dim**0.5
            down = torch.randn(shape.num_experts, shape.input_dim, shape.width) * 0.2 / shape.width**0.5
            self.weights[shape.layer] = nn.Parameter(up.to(device)), nn.Parameter(down.to(device))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self.weights.values() for parameter in pair]

    def __call__(self, layer: int, x_NL: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Callable[[], Tensor]:
        up_EML, down_ELM = self.weights[layer]
        counts_E = topk_ids_NK.flatten().bincount(minlength=len(up_EML))
        self.counts[layer] = self.counts.get(layer, 0) + counts_E.detach()
        order_P = topk_ids_NK.flatten().argsort()
        row_P = order_P // topk_ids_NK.shape[1]
        parts = x_NL.float()[row_P].split(counts_E.tolist())
        with torch.autocast(x_NL.device.type, enabled=False):  # in bf16, oneDNN builds a kernel for each number of rows
            y_PL = torch.cat(
                [
                    F.linear(F.linear(x, up).relu().square(), down)
                    for x, up, down in zip(parts, up_EML.unbind(), down_ELM.unbind(), strict=True)
                ]
            )
        weighted_PL = y_PL * topk_weights_NK.flatten()[order_P, None]
        out_NL = torch.zeros(x_NL.shape, dtype=torch.float32, device=x_NL.device).index_add(0, row_P, weighted_PL)
        return lambda: out_NL


def run_mamba(mixer: Mamba2Mixer, h_BTD: Tensor) -> Tensor:
    """Run a Mamba-2 mixer over whole sequences from zero states: (B, T, D) -> (B, T, D)."""
    shape, (num_seqs, length) = mixer.shape, h_BTD.shape[:2]
    gate, xbc, delta = mixer.split(mixer.in_proj(h_BTD))
    weight: Any = mixer.conv1d.weight
    padded = F.pad(xbc.transpose(1, 2), (shape.conv_kernel - 1, 0))
    xbc = F.silu(F.conv1d(padded, weight, mixer.conv1d.bias, groups=shape.conv_dim)).transpose(1, 2)
    x, delta, a_H, b, c = mixer.scan_inputs(xbc, delta)
    per_seq = length // shape.chunk_size
    requests = torch.arange(num_seqs, device=h_BTD.device)
    chain = tuple((requests * per_seq + depth, requests) for depth in range(per_seq))
    zeros = x.new_zeros(num_seqs, shape.num_heads, shape.head_dim, shape.state_dim)
    pieces = [v.reshape(-1, shape.chunk_size, *v.shape[2:]) for v in (x, delta, b, c)]
    y, _ = ssd_scan(pieces[0], pieces[1], a_H, pieces[2], pieces[3], zeros, chain)
    out: Tensor = mixer.out_proj(mixer.finish(y.reshape(x.shape), x, gate))
    return out


compiled_mamba = torch.compile(run_mamba)  # fuses many small fp32 operations: 8 times faster than eager on a CPU


def run_attention(mixer: Attention, h_BTD: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in mixer.qkv(h_BTD))
    out: Tensor = mixer.o_proj(
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(-2)
    )
    return out


def run_block(block: ResidualBlock, x_BTD: Tensor) -> Tensor:
    h_BTD = block.norm(x_BTD)
    match block.mixer:
        case Mamba2Mixer():
            mixed = compiled_mamba if torch.is_grad_enabled() else run_mamba
            out: Tensor = mixed(block.mixer, h_BTD)
        case Attention():
            out = run_attention(block.mixer, h_BTD)
        case mixer:
            out = mixer(h_BTD.flatten(0, 1)).view_as(h_BTD)
    return x_BTD + out


def sequence_hidden(model: NemotronH, ids_BT: Tensor) -> Tensor:
    """Compute `NemotronH.forward` over whole sequences: token ids (B, T) -> hidden vectors (B, T, D)."""
    x_BTD = model.embeddings(ids_BT)
    for block in model.layers:
        x_BTD = run_block(block, x_BTD)  # type: ignore[arg-type]
    normed: Tensor = model.norm_f(x_BTD)
    return normed


def sequence_draft(model: NemotronH, next_ids_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
    """Compute `NemotronH.draft` over whole sequences: token ids (B, T), hidden vectors (B, T, D) -> (B, T, D)."""
    assert model.mtp is not None
    x_BTD = model.mtp.fuse(model.embeddings(next_ids_BT), hidden_BTD)
    for block in model.mtp.layers:
        x_BTD = run_block(block, x_BTD)  # type: ignore[arg-type]
    return model.mtp.final_norm(x_BTD)
