"""`DeepseekOracle` computes a DeepSeek-V3 model slowly and plainly in float64: logits, hidden vectors and drafts.

The oracle is written from the papers' equations and shares no code with the model. It expands each latent to the key
and the value of every head, while the model never does, and it routes token by token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.model.oracles import rms_norm, swiglu_mlp

LATENT_EPS = 1e-6


class DeepseekOracle:
    """A `DeepseekOracle` holds plain weights by the names of the checkpoint, and the config `raw`.

    `raw` is in the dialect of transformers 5, with the settings of RoPE in `rope_parameters`.
    """

    def __init__(self, tensors: dict[str, Tensor], raw: dict[str, Any]) -> None:
        self.tensors, self.raw = tensors, raw
        self.num_layers, self.eps = raw["num_hidden_layers"], raw["rms_norm_eps"]

    def weight(self, name: str) -> Tensor:
        return self.tensors[f"model.{name}.weight"].double()

    def logits(self, hidden_TD: Tensor) -> Tensor:
        head = "model.embed_tokens.weight" if self.raw.get("tie_word_embeddings") else "lm_head.weight"
        return hidden_TD.double() @ self.tensors[head].double().T

    def hidden(self, token_ids: Sequence[int]) -> Tensor:
        """Return the vectors after the final norm: (T, D)."""
        x = self.weight("embed_tokens")[list(token_ids)]
        for layer in range(self.num_layers):
            x = self.layer(layer, x)
        return rms_norm(x, self.weight("norm"), self.eps)

    def draft(self, hidden_TD: Tensor, next_ids: Sequence[int]) -> Tensor:
        """Return the MTP module's outputs, which follow from the vectors `hidden_TD` and the tokens after them."""
        place = f"layers.{self.num_layers}"
        embedded = rms_norm(self.weight("embed_tokens")[list(next_ids)], self.weight(f"{place}.enorm"), self.eps)
        hidden = rms_norm(hidden_TD, self.weight(f"{place}.hnorm"), self.eps)
        x = torch.cat([embedded, hidden], dim=-1) @ self.weight(f"{place}.eh_proj").T
        return rms_norm(self.layer(self.num_layers, x), self.weight(f"{place}.shared_head.norm"), self.eps)

    def layer(self, layer: int, x: Tensor) -> Tensor:
        place = f"layers.{layer}"
        x = x + self.attention(f"{place}.self_attn", rms_norm(x, self.weight(f"{place}.input_layernorm"), self.eps))
        h = rms_norm(x, self.weight(f"{place}.post_attention_layernorm"), self.eps)
        if layer < self.raw["first_k_dense_replace"]:
            return x + self.mlp(f"{place}.mlp", h)
        return x + torch.stack([self.moe(f"{place}.mlp", row) for row in h])

    def attention(self, place: str, h: Tensor) -> Tensor:
        raw = self.raw
        num_heads, rank = raw["num_attention_heads"], raw["kv_lora_rank"]
        nope, rope, value = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"], raw["v_head_dim"]
        if raw["q_lora_rank"] is None:
            queries = h @ self.weight(f"{place}.q_proj").T
        else:
            down = h @ self.weight(f"{place}.q_a_proj").T
            down = rms_norm(down, self.weight(f"{place}.q_a_layernorm"), LATENT_EPS)
            queries = down @ self.weight(f"{place}.q_b_proj").T
        latents = h @ self.weight(f"{place}.kv_a_proj_with_mqa").T
        shared_key = self.rotated(latents[:, rank:])
        latents = rms_norm(latents[:, :rank], self.weight(f"{place}.kv_a_layernorm"), LATENT_EPS)
        expanded = latents @ self.weight(f"{place}.kv_b_proj").T
        outputs = []
        for head in range(num_heads):
            q = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
            kv = expanded[:, head * (nope + value) : (head + 1) * (nope + value)]
            scores = q[:, :nope] @ kv[:, :nope].T + self.rotated(q[:, nope:]) @ shared_key.T
            future = torch.ones_like(scores).triu(1).bool()
            weights = (scores * self.score_factor()).masked_fill(future, -math.inf).softmax(-1)
            outputs.append(weights @ kv[:, nope:])
        return torch.cat(outputs, dim=-1) @ self.weight(f"{place}.o_proj").T

    def moe(self, place: str, h: Tensor) -> Tensor:
        """Return the output for one token."""
        raw = self.raw
        scores = (self.weight(f"{place}.gate") @ h).sigmoid()
        choice = scores + self.tensors[f"model.{place}.gate.e_score_correction_bias"].double()
        groups = choice.view(raw["n_group"], -1)
        two_best = [sum(sorted(group.tolist())[-2:]) for group in groups]
        best = sorted(range(len(two_best)), key=two_best.__getitem__)[-raw["topk_group"] :]
        allowed = [g * groups.shape[1] + e for g in best for e in range(groups.shape[1])]
        chosen = sorted(allowed, key=lambda e: float(choice[e]))[-raw["num_experts_per_tok"] :]
        total = sum(float(scores[e]) for e in chosen) if raw["norm_topk_prob"] else 1.0
        out = torch.zeros_like(h) if not raw["n_shared_experts"] else self.mlp(f"{place}.shared_experts", h)
        for e in chosen:
            out = out + scores[e] / total * raw["routed_scaling_factor"] * self.mlp(f"{place}.experts.{e}", h)
        return out

    def mlp(self, place: str, h: Tensor) -> Tensor:
        return swiglu_mlp(h, *(self.weight(f"{place}.{name}_proj") for name in ("gate", "up", "down")))

    def rotated(self, x: Tensor) -> Tensor:
        """Return the vectors (T, E) rotated by the positions 0, 1, 2, … of their rows."""
        out, rope = torch.empty_like(x), self.raw["rope_parameters"]
        factor = self.magnitude("mscale") / self.magnitude("mscale_all_dim")
        if rope["rope_type"] == "yarn" and not (rope.get("mscale") and rope.get("mscale_all_dim")):
            factor = 0.1 * math.log(rope["factor"]) + 1
        positions = torch.arange(len(x), dtype=torch.float64)
        for f, frequency in enumerate(self.frequencies()):
            i, j = (2 * f, 2 * f + 1) if self.raw.get("rope_interleave", True) else (f, f + x.shape[1] // 2)
            number = torch.complex(x[:, i], x[:, j]) * torch.exp(1j * positions * frequency) * factor
            out[:, i], out[:, j] = number.real, number.imag
        return out

    def frequencies(self) -> list[float]:
        rope, dim = self.raw["rope_parameters"], self.raw["qk_rope_head_dim"]
        theta = float(rope["rope_theta"])
        plain = [theta ** (-2 * f / dim) for f in range(dim // 2)]
        if rope["rope_type"] == "default":
            return plain
        context = rope["original_max_position_embeddings"]

        def border(rotations: float) -> float:
            return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(border(rope["beta_fast"])), 0)
        high = min(math.ceil(border(rope["beta_slow"])), dim - 1)
        shares = [min(max((f - low) / ((high - low) or 0.001), 0), 1) for f in range(dim // 2)]
        return [p * (1 - share) + p / rope["factor"] * share for p, share in zip(plain, shares, strict=True)]

    def score_factor(self) -> float:
        return (self.raw["qk_nope_head_dim"] + self.raw["qk_rope_head_dim"]) ** -0.5 * self.magnitude(
            "mscale_all_dim"
        ) ** 2

    def magnitude(self, key: str) -> float:
        rope = self.raw["rope_parameters"]
        return 0.1 * (rope.get(key) or 0) * math.log(rope["factor"]) + 1 if rope["rope_type"] == "yarn" else 1.0
