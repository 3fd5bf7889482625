"""`NemotronH` implements the Nemotron 3 family (Super, Nano, Ultra), with Mamba-2, attention, MoE and dense layers.

What surprises:

- Every layer is one norm and one mixer; an MTP module follows the layers.
- Attention has no position encoding, although the config has `rope_theta`.
- The MTP module reads the output of the *final* norm, concatenates the embedding before the hidden vector, and shares
  the embedding and the head with the backbone.
- The MTP module's weights have flat names (`mtp.layers.{step·len(pattern) + inner}`).

Legend: T tokens of the step, D hidden, V vocabulary, L expert input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from model.blocks.attention import Attention
from model.blocks.embedding import Embedding
from model.blocks.expert_bank import Experts
from model.blocks.linear import Linear
from model.blocks.mamba import Mamba2Mixer
from model.blocks.mixer import Mixer, ResidualBlock
from model.blocks.mlp import DenseMLP
from model.blocks.moe import MoE
from model.blocks.norm import RMSNorm
from model.blocks.router import SigmoidRouter
from model.configs.nemotron_h import NemotronHConfig
from model.families.checkpoint_family import BackboneModule, CheckpointFamily
from model.state import Batch, State

PREFIXES = ("backbone.", "model.", "language_model.backbone.", "language_model.model.")


def make_block(config: NemotronHConfig, layer: int, experts: Experts) -> ResidualBlock:
    norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
    return ResidualBlock(norm, make_mixer(config, layer, experts))


def make_mixer(config: NemotronHConfig, layer: int, experts: Experts) -> Mixer:
    match config.layers[layer]:
        case "M":
            return Mamba2Mixer(config.mamba, layer, config.layer_norm_epsilon, config.use_conv_bias, config.use_bias)
        case "*":
            return Attention(config.attention, layer, config.attention_bias)
        case "-":
            return DenseMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        case _:
            return make_moe(config, layer, experts)


def make_moe(config: NemotronHConfig, layer: int, experts: Experts) -> MoE:
    shape = next(shape for shape in config.expert_shapes if shape.layer == layer)
    groups = (config.n_group, config.topk_group)
    router = SigmoidRouter(config.hidden_size, shape, config.routed_scaling_factor, *groups, config.norm_topk_prob)
    is_latent = config.moe_latent_size is not None
    shared = DenseMLP(config.hidden_size, config.moe_shared_expert_intermediate_size, config.mlp_bias)
    return MoE(config.hidden_size, shape, router, experts, shared, is_latent=is_latent, bias=config.mlp_bias)


class MTPModule(nn.Module):
    """An `MTPModule` drafts the token after next from a position's hidden vector and the next token's embedding."""

    def __init__(self, config: NemotronHConfig, experts: Experts) -> None:
        super().__init__()
        inner = len(config.mtp_pattern)
        assert config.num_nextn_predict_layers == 1, "checked by the config"
        self.layers = nn.ModuleList(make_block(config, config.num_layers + i, experts) for i in range(inner))
        eps = config.layer_norm_epsilon
        first, last = self.layers[0], self.layers[inner - 1]
        first.enorm = RMSNorm(config.hidden_size, eps)
        first.hnorm = RMSNorm(config.hidden_size, eps)
        first.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        last.final_layernorm = RMSNorm(config.hidden_size, eps)

    def fuse(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Compute eh_proj of [enorm(embedding) | hnorm(hidden)]: (..., D), (..., D) -> (..., D)."""
        first: Any = self.layers[0]
        fused: Tensor = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], dim=-1))
        return fused

    def final_norm(self, x: Tensor) -> Tensor:
        last: Any = self.layers[-1]
        normed: Tensor = last.final_layernorm(x)
        return normed

    def forward(self, embedded_TD: Tensor, hidden_TD: Tensor, batch: Batch, state: State) -> Tensor:
        x_TD = self.fuse(embedded_TD, hidden_TD)
        for block in self.layers:
            x_TD = block(x_TD, batch, state)
        return self.final_norm(x_TD)


class NemotronH(BackboneModule):
    """A `NemotronH` is a model without its routed experts; `mtp` is None if there is no MTP module to draft with."""

    config: NemotronHConfig

    def __init__(
        self, config: NemotronHConfig, experts: Experts, with_mtp: bool = True, has_own_head: bool | None = None
    ) -> None:
        super().__init__()
        self.config = config
        has_own_head = not config.tie_word_embeddings if has_own_head is None else has_own_head
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_block(config, layer, experts) for layer in range(config.num_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = Linear(config.hidden_size, config.vocab_size) if has_own_head else None
        self.mtp = MTPModule(config, experts) if with_mtp and config.num_nextn_predict_layers else None

    @property
    def has_drafts(self) -> bool:
        return self.mtp is not None

    def forward(self, batch: Batch, state: State) -> Tensor:
        """Return the hidden vectors after the final norm: (T, D).

        The recurrent state of requests with drafts does not change before `commit`.
        """
        x_TD = self.embeddings(batch.token_ids_T)
        for block in self.layers:
            x_TD = block(x_TD, batch, state)
        out: Tensor = self.norm_f(x_TD)
        return out

    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State) -> None:
        """Advance the recurrent state of requests with drafts over all tokens of the last step except rejected drafts.

        `batch` is the batch of the last step; `num_accepted` has the number of accepted drafts of each request.

        The step keeps the inputs of these requests, 0.7 MiB per token, and `commit` runs the recurrence over the inputs
        again. Keeping a copy of the state before each draft would need 1 + drafts times the memory of the state for
        every running request: 974 MiB per sequence for Super at 5 drafts.
        """
        places, accepted = batch.accepted(num_accepted)
        for block in self.layers:
            mixer: Any = block.mixer
            mixer.commit(places, accepted, state)

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State) -> Tensor:
        """Run the MTP module for one step and return hidden vectors (T, D); `logits` of these vectors give the drafts.

        - `batch.token_ids_T` are the tokens that follow the positions of `hidden_TD`.
        - `hidden_TD` (T, D) is the output of `forward` or, for the second and later drafts, the output of `draft`.
        """
        assert self.mtp is not None
        out: Tensor = self.mtp(self.embeddings(batch.token_ids_T), hidden_TD, batch, state)
        return out


class NemotronHFamily(CheckpointFamily):
    """A `NemotronHFamily` is a checkpoint of Nemotron 3 Super, Nano or Ultra."""

    fp32_parameters = ("A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias")

    @cached_property
    def config(self) -> NemotronHConfig:
        """Return the checked config."""
        return NemotronHConfig.from_json(self.checkpoint.config, self.checkpoint.generation_config)

    @cached_property
    def prefix(self) -> str:
        """Return the prefix of the backbone's tensor names; raise ValueError if the checkpoint has no embeddings."""
        for prefix in PREFIXES:
            if f"{prefix}embeddings.weight" in self.checkpoint:
                return prefix
        raise ValueError(f"the checkpoint {self.checkpoint.path} has no tensor backbone.embeddings.weight")

    @cached_property
    def has_mtp(self) -> bool:
        """Return True if drafting is possible: the config asks for an MTP module and the checkpoint has its weights."""
        root = tensor_name("mtp.", self.prefix)
        wanted = self.config.num_nextn_predict_layers > 0
        return wanted and any(name.startswith(root) for name in self.checkpoint.names)

    def tensor_name(self, parameter_name: str) -> str:
        """Return the name of a parameter's tensor in the checkpoint."""
        return tensor_name(parameter_name, self.prefix)

    def expert_name(self, layer: int, expert: int, matrix: str) -> str:
        """Return the name in the checkpoint of an expert's matrix "up" or "down"."""
        return expert_tensor_name(self.config, layer, expert, matrix, self.prefix)

    def is_ignored(self, name: str) -> bool:
        """Return True for the head if it is tied; `_has_own_head` says if it is served all the same."""
        return self.config.tie_word_embeddings and name == self.tensor_name("lm_head.weight")

    def make_module(self, experts: Experts, has_own_head: bool) -> NemotronH:
        """Return the module with uninitialised parameters on PyTorch's current device."""
        return NemotronH(self.config, experts, self.has_mtp, has_own_head)


def tensor_name(parameter_name: str, prefix: str) -> str:
    """Return the name of a parameter's tensor in a checkpoint whose backbone's names begin with `prefix`.

    The names of the head and of the MTP module lack the part "backbone." or "model." at the end of the prefix.
    """
    if parameter_name.startswith(("lm_head.", "mtp.")):
        return prefix.removesuffix("backbone.").removesuffix("model.") + parameter_name
    return prefix + parameter_name


def expert_tensor_name(config: NemotronHConfig, layer: int, expert: int, matrix: str, prefix: str) -> str:
    """Return the name of the weight of an expert's matrix "up" or "down"; `prefix` is passed to `tensor_name`."""
    is_mtp = layer >= config.num_layers
    place = f"mtp.layers.{layer - config.num_layers}" if is_mtp else f"layers.{layer}"
    return tensor_name(f"{place}.mixer.experts.{expert}.{matrix}_proj.weight", prefix)
