"""`Qwen3Next` implements the Qwen3-Next family (Qwen3-Coder-Next), with Gated DeltaNet, gated attention and MoE layers.

What surprises:

- Every layer is two residual blocks: DeltaNet or attention, and then a MoE or a dense MLP.
- The scale of every norm is 1 + weight, except in the output norm of DeltaNet.
- The query projection also gives a gate for each number of the attention's output.
- No key of the config tells if a checkpoint has an MTP module; its tensors (`mtp.*`) do. The module is one layer with
  attention and MoE. It reads the output of the *final* norm.
- The head may have more rows than the tokenizer has tokens.

Legend: T tokens of the step, D hidden, V vocabulary.
Source: the model's code in transformers; for the MTP module, which transformers does not load, vLLM's code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from model.blocks.attention import GatedAttention
from model.blocks.decoder_layer import DecoderLayer
from model.blocks.delta_net import GatedDeltaNet
from model.blocks.embedding import Embedding
from model.blocks.expert_bank import Experts
from model.blocks.linear import Linear
from model.blocks.mixer import Mixer
from model.blocks.mlp import DenseMLP
from model.blocks.moe import MoE
from model.blocks.norm import RMSNorm
from model.blocks.rope import Rope
from model.blocks.router import SoftmaxRouter
from model.configs.qwen3_next import FULL, Qwen3NextConfig
from model.families.checkpoint_family import BackboneModule, CheckpointFamily
from model.state import Batch, State


def make_norm(config: Qwen3NextConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, is_zero_centred=True)


def make_layer(config: Qwen3NextConfig, layer: int, rope: Rope, experts: Experts) -> DecoderLayer:
    mixer, mlp = make_mixer(config, layer, rope), make_mlp(config, layer, experts)
    return DecoderLayer(make_norm(config), mixer, make_norm(config), mlp)


def make_mixer(config: Qwen3NextConfig, layer: int, rope: Rope) -> Mixer:
    """Return the mixer of a layer. The layers of the MTP module follow the other layers and have full attention."""
    if layer >= config.num_layers or config.layer_types[layer] == FULL:
        return GatedAttention(config.attention, layer, rope, config.rms_norm_eps)
    return GatedDeltaNet(config.delta_net, layer, config.rms_norm_eps)


def make_mlp(config: Qwen3NextConfig, layer: int, experts: Experts) -> Mixer:
    hidden = config.hidden_size
    shape = next((shape for shape in config.expert_shapes if shape.layer == layer), None)
    if shape is None:
        return DenseMLP(hidden, config.intermediate_size, kind="swiglu")
    router = SoftmaxRouter(hidden, shape, config.norm_topk_prob)
    shared = DenseMLP(hidden, config.shared_expert_intermediate_size, kind="swiglu")
    return MoE(hidden, shape, router, experts, shared, is_shared_gated=True)


class Qwen3NextMTP(nn.Module):
    """A `Qwen3NextMTP` drafts the token after next from a position's hidden vector and the next token's embedding."""

    def __init__(self, config: Qwen3NextConfig, rope: Rope, experts: Experts) -> None:
        super().__init__()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = make_norm(config), make_norm(config)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([make_layer(config, config.num_layers, rope, experts)])
        self.norm = make_norm(config)

    def forward(self, embedded_TD: Tensor, hidden_TD: Tensor, batch: Batch, state: State) -> Tensor:
        halves = [self.pre_fc_norm_embedding(embedded_TD), self.pre_fc_norm_hidden(hidden_TD)]
        x_TD: Tensor = self.fc(torch.cat(halves, dim=-1))
        for layer in self.layers:
            x_TD = layer(x_TD, batch, state)
        out: Tensor = self.norm(x_TD)
        return out


class Qwen3Next(BackboneModule):
    """A `Qwen3Next` is a model without its routed experts; `mtp` is None if there is no MTP module to draft with."""

    def __init__(self, config: Qwen3NextConfig, experts: Experts, has_own_head: bool) -> None:
        super().__init__()
        self.config, rope = config, Rope(config.rope)
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(config, layer, rope, experts) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size) if has_own_head else None
        self.mtp = Qwen3NextMTP(config, rope, experts) if config.num_nextn_predict_layers else None

    @property
    def has_drafts(self) -> bool:
        return self.mtp is not None

    def forward(self, batch: Batch, state: State) -> Tensor:
        """Return the hidden vectors after the final norm: (T, D).

        The recurrent state of requests with drafts does not change before `commit`.
        """
        x_TD = self.embeddings(batch.token_ids_T)
        for layer in self.layers:
            x_TD = layer(x_TD, batch, state)
        out: Tensor = self.norm(x_TD)
        return out

    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State) -> None:
        """Advance the recurrent state of requests with drafts, as `LanguageModel.commit` says."""
        places, accepted = batch.accepted(num_accepted)
        layer: Any
        for layer in self.layers:
            layer.attention.mixer.commit(places, accepted, state)

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State) -> Tensor:
        """Run the MTP module for one step and return hidden vectors (T, D), as `LanguageModel.draft` says."""
        assert self.mtp is not None
        out: Tensor = self.mtp(self.embeddings(batch.token_ids_T), hidden_TD, batch, state)
        return out


class Qwen3NextFamily(CheckpointFamily):
    """A `Qwen3NextFamily` is a checkpoint of Qwen3-Next or Qwen3-Coder-Next."""

    fp32_parameters = ("A_log", "dt_bias", "mixer.gate.weight")

    @cached_property
    def config(self) -> Qwen3NextConfig:
        """Return the checked config; the checkpoint's tensors tell the number of layers of its MTP module."""
        found = (MTP_LAYER.match(name) for name in self.checkpoint.names)
        count = 1 + max((int(place[1]) for place in found if place), default=-1)
        raw = {**self.checkpoint.config, "num_nextn_predict_layers": count}
        return Qwen3NextConfig.from_json(raw, self.checkpoint.generation_config)

    @property
    def has_mtp(self) -> bool:
        """Return True if the checkpoint has the weights of an MTP module."""
        return self.config.num_nextn_predict_layers > 0

    def tensor_name(self, parameter_name: str) -> str:
        """Return the name of a parameter's tensor in the checkpoint."""
        return tensor_name(parameter_name)

    def expert_name(self, layer: int, expert: int, matrix: str) -> str:
        """Return the name in the checkpoint of an expert's matrix "gate", "up" or "down"."""
        num_layers = self.config.num_layers
        place = f"mtp.layers.{layer - num_layers}" if layer >= num_layers else f"model.layers.{layer}"
        return f"{place}.mlp.experts.{expert}.{matrix}_proj.weight"

    def is_ignored(self, name: str) -> bool:
        """Return True for a tied head, and for the frequencies of RoPE that older versions of transformers wrote."""
        is_head = self.config.tie_word_embeddings and name == "lm_head.weight"
        return is_head or name.endswith("rotary_emb.inv_freq")

    def make_module(self, experts: Experts, has_own_head: bool) -> Qwen3Next:
        """Return the module with uninitialised parameters on PyTorch's current device."""
        return Qwen3Next(self.config, experts, has_own_head)


MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
PLACES = {  # parts of parameters' names and of the names in the checkpoint
    "embeddings.": "embed_tokens.",
    ".attention.norm.": ".input_layernorm.",
    ".mlp.norm.": ".post_attention_layernorm.",
    ".mlp.mixer.shared_experts.": ".mlp.shared_expert.",
    ".mlp.mixer.shared_gate.": ".mlp.shared_expert_gate.",
    ".mlp.mixer.": ".mlp.",
}


def tensor_name(parameter_name: str) -> str:
    """Return the name in the checkpoint of the tensor for a parameter of a `Qwen3Next`."""
    name = parameter_name
    for ours, theirs in PLACES.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"\.attention\.mixer\.(?=[qkvo]_)", ".self_attn.", name).replace(".attention.mixer.", ".linear_attn.")
    return name if name.startswith(("lm_head.", "mtp.")) else f"model.{name}"
