"""`DeepseekV3` implements the DeepSeek-V3 family (V3, R1, V3.1, Moonlight), with MLA, dense MLPs and MoE layers.

What surprises:

- Every layer is two residual blocks: attention, and then a dense MLP or a MoE.
- The MTP module is one more layer. Its weights have the number `num_hidden_layers`, together with copies of the
  embeddings and of the head, which are not read.
- The MTP module reads the output of the *final* norm, and concatenates the embedding before the hidden vector, although
  the paper's equation 21 has the two in the other order.
- No layer has recurrent state, so accepting drafts changes nothing.

Legend: T tokens of the step, D hidden, V vocabulary.
Source: DeepSeek-V3 (arXiv 2412.19437); the model file that is part of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from model.blocks.decoder_layer import DecoderLayer
from model.blocks.embedding import Embedding
from model.blocks.expert_bank import Experts
from model.blocks.linear import Linear
from model.blocks.mixer import Mixer
from model.blocks.mla import MLA
from model.blocks.mlp import DenseMLP
from model.blocks.moe import MoE
from model.blocks.norm import RMSNorm
from model.blocks.rope import Rope
from model.blocks.router import SigmoidRouter
from model.configs.deepseek_v3 import DeepseekV3Config
from model.families.checkpoint_family import BackboneModule, CheckpointFamily
from model.state import Batch, State


def make_layer(config: DeepseekV3Config, layer: int, rope: Rope, experts: Experts) -> DecoderLayer:
    norms = [RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)]
    attention = MLA(config.mla, rope, config.softmax_scale, layer)
    return DecoderLayer(norms[0], attention, norms[1], make_mlp(config, layer, experts))


def make_mlp(config: DeepseekV3Config, layer: int, experts: Experts) -> Mixer:
    if layer < config.first_k_dense_replace:
        return DenseMLP(config.hidden_size, config.intermediate_size, kind="swiglu")
    shape = next(shape for shape in config.expert_shapes if shape.layer == layer)
    groups = (config.n_group, config.topk_group)
    router = SigmoidRouter(config.hidden_size, shape, config.routed_scaling_factor, *groups, config.norm_topk_prob)
    width = config.n_shared_experts * config.moe_intermediate_size
    shared = DenseMLP(config.hidden_size, width, kind="swiglu") if width else None
    return MoE(config.hidden_size, shape, router, experts, shared)


class DeepseekMTP(nn.Module):
    """A `DeepseekMTP` drafts the token after next from a position's hidden vector and the next token's embedding."""

    def __init__(self, config: DeepseekV3Config, rope: Rope, experts: Experts) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.layer = make_layer(config, config.num_layers, rope, experts)
        self.norm = RMSNorm(hidden, eps)

    def forward(self, embedded_TD: Tensor, hidden_TD: Tensor, batch: Batch, state: State) -> Tensor:
        x_TD: Tensor = self.eh_proj(torch.cat([self.enorm(embedded_TD), self.hnorm(hidden_TD)], dim=-1))
        out: Tensor = self.norm(self.layer(x_TD, batch, state))
        return out


class DeepseekV3(BackboneModule):
    """A `DeepseekV3` is a model without its routed experts; `mtp` is None if there is no MTP module to draft with."""

    def __init__(self, config: DeepseekV3Config, experts: Experts, with_mtp: bool, has_own_head: bool) -> None:
        super().__init__()
        self.config, rope = config, Rope(config.rope)
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(config, layer, rope, experts) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size) if has_own_head else None
        self.mtp = DeepseekMTP(config, rope, experts) if with_mtp else None

    @property
    def has_drafts(self) -> bool:
        return self.mtp is not None

    def forward(self, batch: Batch, state: State) -> Tensor:
        """Return the hidden vectors after the final norm: (T, D)."""
        x_TD = self.embeddings(batch.token_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, batch, state)
        out: Tensor = self.norm(x_TD)
        return out

    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State) -> None:
        """Do nothing: later steps overwrite the latents of rejected drafts before any token reads them."""

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State) -> Tensor:
        """Run the MTP module for one step and return hidden vectors (T, D), as `LanguageModel.draft` says.

        The output is the vector after the module's own last norm. Reading this vector back for the next draft, instead
        of the vector before the norm, raises the acceptance of later drafts.
        """
        assert self.mtp is not None
        out: Tensor = self.mtp(self.embeddings(batch.token_ids_T), hidden_TD, batch, state)
        return out


class DeepseekV3Family(CheckpointFamily):
    """A `DeepseekV3Family` is a checkpoint of DeepSeek-V3, R1, V3.1 or Moonlight."""

    fp32_parameters = ("mixer.gate.weight", "mixer.gate.e_score_correction_bias")

    @cached_property
    def config(self) -> DeepseekV3Config:
        """Return the checked config."""
        return DeepseekV3Config.from_json(self.checkpoint.config, self.checkpoint.generation_config)

    @cached_property
    def has_mtp(self) -> bool:
        """Return True if drafting is possible: the config asks for an MTP module and the checkpoint has its weights."""
        place = f"model.layers.{self.config.num_layers}."
        return self.config.num_nextn_predict_layers > 0 and any(n.startswith(place) for n in self.checkpoint.names)

    def tensor_name(self, parameter_name: str) -> str:
        """Return the name of a parameter's tensor in the checkpoint."""
        return tensor_name(parameter_name, self.config.num_layers)

    def expert_name(self, layer: int, expert: int, matrix: str) -> str:
        """Return the name in the checkpoint of an expert's matrix "gate", "up" or "down"."""
        return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"

    def is_ignored(self, name: str) -> bool:
        """Return True for a tied head, the MTP module's copies of other weights, and frequencies of older versions."""
        mtp = f"model.layers.{self.config.num_layers}"
        copies = (f"{mtp}.embed_tokens.weight", f"{mtp}.shared_head.head.weight")
        is_head = self.config.tie_word_embeddings and name == "lm_head.weight"
        return is_head or name in copies or name.endswith(".rotary_emb.inv_freq")

    def make_module(self, experts: Experts, has_own_head: bool) -> DeepseekV3:
        """Return the module with uninitialised parameters on PyTorch's current device."""
        return DeepseekV3(self.config, experts, self.has_mtp, has_own_head)


MTP_PLACES = {"mtp.layer.": "", "mtp.norm.": "shared_head.norm.", "mtp.": ""}  # by the beginning of a parameter's name
LAYER_PLACES = {
    "attention.norm.": "input_layernorm.",
    "attention.mixer.": "self_attn.",
    "mlp.norm.": "post_attention_layernorm.",
    "mlp.mixer.": "mlp.",
}


def tensor_name(parameter_name: str, num_layers: int) -> str:
    """Return the name in the checkpoint of the tensor for a parameter of a `DeepseekV3` with `num_layers` layers."""
    if parameter_name.startswith("lm_head."):
        return parameter_name
    name = parameter_name.replace("embeddings.", "embed_tokens.")
    for ours, theirs in MTP_PLACES.items():
        if name.startswith(ours):
            name = f"layers.{num_layers}.{theirs}{name.removeprefix(ours)}"
    for ours, theirs in LAYER_PLACES.items():
        name = name.replace(ours, theirs, 1)
    return f"model.{name}"
