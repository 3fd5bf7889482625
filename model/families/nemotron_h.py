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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model import kernels
from model.blocks.attention import Attention, AttentionShape
from model.blocks.linear import Linear
from model.blocks.mamba import Mamba2Mixer, MambaShape
from model.blocks.moe import DenseMLP, Experts, ExpertShape, LocalExperts, MoE, Router
from model.blocks.norm import RMSNorm
from model.checkpoint import Checkpoint
from model.cpu import layers as cpu_layers
from model.cpu.linear import linear
from model.cpu.packed_matrix import PackedMatrix, pack_matrix
from model.state import Batch, State, StateSpec

LETTERS = {
    "M": ("mamba", "linear_attention"),
    "E": ("moe",),
    "*": ("attention", "full_attention"),
    "-": ("mlp",),
}
PREFIXES = ("backbone.", "model.", "language_model.backbone.", "language_model.model.")
FP32_PARAMETERS = ("A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias")
FIXED = {  # for each key, the only value that this code supports; `from_json` raises ValueError for another value
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "n_shared_experts": (1,),
}


def _eos_token_ids(configs: dict[str, dict[str, Any]]) -> tuple[int, ...]:
    """Return the end-of-sequence ids of all `configs`, by file name, without repetition.

    The two files of a model often differ: `config.json` has the end of a text and `generation_config.json` the end of a
    turn. The model may write either.
    """
    found: list[int] = []
    for file, config in configs.items():
        given = config.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise ValueError(f"{file} has eos_token_id = {given!r}; allowed are a token id or a list of token ids")
        found += ids
    return tuple(dict.fromkeys(found))


def _pattern(raw: dict[str, Any], prefix: str) -> str | None:
    """Return the layer pattern as a string of letters, or None if the config has no layer pattern.

    `prefix` is "" for the backbone's pattern and "mtp_" for the MTP module's pattern. A config gives the pattern as
    letters, or as a list of old or new layer names.
    """
    if pattern := raw.get(f"{prefix}hybrid_override_pattern"):
        for letter in pattern:
            if letter not in LETTERS:
                raise ValueError(f"{prefix}hybrid_override_pattern has the layer {letter!r}; allowed are M, E, * and -")
        return str(pattern)
    names = raw.get(f"{prefix}layers_block_type")
    if names is None:
        return None
    letters = {name: letter for letter, aliases in LETTERS.items() for name in aliases}
    for name in names:
        if name not in letters:
            raise ValueError(f"{prefix}layers_block_type has the layer {name!r}; allowed are {', '.join(letters)}")
    return "".join(letters[name] for name in names)


@dataclass(frozen=True)
class NemotronHConfig:
    """A `NemotronHConfig` holds the checked values of `config.json` and `generation_config.json`.

    The letters of a layer pattern are M for Mamba-2, E for MoE, * for attention and - for a dense MLP.
    """

    vocab_size: int
    hidden_size: int
    pattern: str
    mtp_pattern: str
    num_nextn_predict_layers: int
    mamba: MambaShape
    attention: AttentionShape
    intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    moe_latent_size: int | None
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    layer_norm_epsilon: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    use_conv_bias: bool
    use_bias: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # end tokens of both configs; `ModelFamily.eos_token_ids` adds the tokenizer's

    @classmethod
    def from_json(cls, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> NemotronHConfig:
        """Create a config from a model's `config.json`, in any public dialect, and its `generation_config.json`.

        Raises ValueError if a key is missing or has a value that is not allowed; the message names the first such key.
        """

        def need(key: str) -> int:
            value = raw.get(key)
            if value is None:
                raise ValueError(f"config.json lacks the key {key}")
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"config.json has {key} = {value!r}; allowed is a positive integer")
            return value

        for key, allowed in FIXED.items():
            if key in raw and raw[key] not in allowed:
                raise ValueError(f"config.json has {key} = {raw[key]!r}; supported is {allowed[0]!r}")
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise ValueError(f"config.json has a quantization_config ({method}); supported are bf16 and fp32 weights")
        pattern = _pattern(raw, "")
        if pattern is None:
            raise ValueError("config.json lacks the key hybrid_override_pattern (or layers_block_type)")
        if raw.get("num_hidden_layers") not in (None, len(pattern)):
            given = raw["num_hidden_layers"]
            raise ValueError(f"config.json has num_hidden_layers = {given!r}, but a pattern of {len(pattern)} layers")
        hidden = need("hidden_size")
        limit = raw.get("time_step_limit") or (0.0, float("inf"))
        mamba = MambaShape(
            hidden,
            need("mamba_num_heads"),
            need("mamba_head_dim"),
            raw.get("mamba_n_groups") or need("n_groups"),
            need("ssm_state_size"),
            raw.get("mamba_d_conv") or need("conv_kernel"),
            raw.get("mamba_chunk_size") or need("chunk_size"),
            (float(limit[0]), float(limit[1])),
        )
        num_heads = need("num_attention_heads")
        num_kv_heads = raw.get("num_key_value_heads") or num_heads
        has_moe = "E" in pattern
        return cls(
            vocab_size=need("vocab_size"),
            hidden_size=hidden,
            pattern=pattern,
            mtp_pattern=_pattern(raw, "mtp_") or "*E",
            num_nextn_predict_layers=raw.get("num_nextn_predict_layers") or 0,
            mamba=mamba,
            attention=AttentionShape(hidden, num_heads, num_kv_heads, need("head_dim")),
            intermediate_size=need("intermediate_size") if "-" in pattern else 0,
            n_routed_experts=need("n_routed_experts") if has_moe else 0,
            num_experts_per_tok=need("num_experts_per_tok") if has_moe else 0,
            moe_intermediate_size=need("moe_intermediate_size") if has_moe else 0,
            moe_shared_expert_intermediate_size=need("moe_shared_expert_intermediate_size") if has_moe else 0,
            moe_latent_size=need("moe_latent_size") if raw.get("moe_latent_size") else None,
            routed_scaling_factor=float(raw.get("routed_scaling_factor", 1.0)),
            n_group=raw.get("n_group") or 1,
            topk_group=raw.get("topk_group") or 1,
            norm_topk_prob=raw.get("norm_topk_prob", True),
            layer_norm_epsilon=raw.get("layer_norm_epsilon") or raw.get("norm_eps") or 1e-5,
            max_position_embeddings=need("max_position_embeddings"),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            use_conv_bias=raw.get("use_conv_bias", True),
            use_bias=raw.get("use_bias", False) or raw.get("mamba_proj_bias", False),
            attention_bias=raw.get("attention_bias", False),
            mlp_bias=raw.get("mlp_bias", False),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_eos_token_ids({"generation_config.json": generation or {}, "config.json": raw}),
        )

    def __post_init__(self) -> None:
        def divides(large: str, big: int, small: str, part: int) -> None:
            if part < 1 or big % part:
                raise ValueError(f"config.json has {large} = {big}, which {small} = {part} does not divide")

        if self.num_nextn_predict_layers not in (0, 1):
            given = self.num_nextn_predict_layers
            raise ValueError(f"config.json has num_nextn_predict_layers = {given!r}; supported are 0 and 1")
        mamba, attention = self.mamba, self.attention
        divides("mamba_num_heads", mamba.num_heads, "n_groups", mamba.num_groups)
        divides("num_attention_heads", attention.num_heads, "num_key_value_heads", attention.num_kv_heads)
        if "E" in self.pattern:
            divides("n_routed_experts", self.n_routed_experts, "n_group", self.n_group)
            for small, large in (("num_experts_per_tok", "n_routed_experts"), ("topk_group", "n_group")):
                value, most = getattr(self, small), getattr(self, large)
                if not 1 <= value <= most:
                    raise ValueError(f"config.json has {small} = {value}; allowed is 1 to {large} = {most}")

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @cached_property
    def layers(self) -> str:
        """Return the letters of the backbone's layers, followed by the letters of the MTP module's layers."""
        return self.pattern + self.mtp_pattern * self.num_nextn_predict_layers

    @cached_property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        input_dim = self.moe_latent_size or self.hidden_size
        sizes = (self.n_routed_experts, self.num_experts_per_tok, input_dim, self.moe_intermediate_size)
        return tuple(ExpertShape(layer, *sizes) for layer, letter in enumerate(self.layers) if letter == "E")

    @cached_property
    def state_spec(self) -> StateSpec:
        return StateSpec(
            tuple(self.attention.state_spec(layer) for layer, letter in enumerate(self.layers) if letter == "*"),
            tuple(self.mamba.state_spec(layer) for layer, letter in enumerate(self.layers) if letter == "M"),
        )

    @property
    def chunk_size(self) -> int:
        """Return the chunk size in tokens: a prompt may be split between steps at multiples of the chunk size."""
        return self.mamba.chunk_size


class Block(nn.Module):
    """A `Block` computes x + mixer(norm(x)): (T, D) -> (T, D)."""

    def __init__(self, config: NemotronHConfig, layer: int, experts: Experts) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = make_mixer(config, layer, experts)

        self.is_packed = False

    def pack(self, dtype: torch.dtype) -> None:
        """Prepare the CPU kernels; from now on `forward` runs the CPU kernels and changes `x_TD` in place."""
        mixer: Any = self.mixer
        mixer.pack(self.norm, dtype)
        self.is_packed = True

    def forward(self, x_TD: Tensor, batch: Batch, state: State) -> Tensor:
        if self.is_packed:
            mixer: Any = self.mixer
            mixer.add_to(x_TD, batch, state)
            return x_TD
        out: Tensor = x_TD + self.mixer(self.norm(x_TD), batch, state)
        return out


def make_mixer(config: NemotronHConfig, layer: int, experts: Experts) -> nn.Module:
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
    router = Router(config.hidden_size, shape, config.routed_scaling_factor, *groups, config.norm_topk_prob)
    is_latent = config.moe_latent_size is not None
    shared_width = config.moe_shared_expert_intermediate_size
    return MoE(config.hidden_size, shape, shared_width, router, experts, is_latent=is_latent, bias=config.mlp_bias)


class MTPModule(nn.Module):
    """An `MTPModule` drafts the token after next from a position's hidden vector and the next token's embedding."""

    def __init__(self, config: NemotronHConfig, experts: Experts) -> None:
        super().__init__()
        inner = len(config.mtp_pattern)
        assert config.num_nextn_predict_layers == 1, "checked by the config"
        self.layers = nn.ModuleList(Block(config, config.num_layers + i, experts) for i in range(inner))
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


class NemotronH(nn.Module):
    """A `NemotronH` is a model without its routed experts; `mtp` is None if there is no MTP module to draft with."""

    def __init__(self, config: NemotronHConfig, experts: Experts, with_mtp: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, experts) for layer in range(config.num_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.mtp = MTPModule(config, experts) if with_mtp and config.num_nextn_predict_layers else None
        self.packed_head: PackedMatrix | None = None  # set only if head and embeddings are tied
        self.packed_rows: tuple[NDArray[np.generic], bool] | None = None  # the embeddings, and True if they are bf16

    @property
    def has_drafts(self) -> bool:
        return self.mtp is not None

    def pack(self, dtype: torch.dtype) -> None:
        """Copy the weights into the CPU kernels' layout.

        From then on, activations are fp32, and the rows that go to the experts are `dtype`.
        """
        rows = self.embeddings.weight.detach()
        is_bf16 = rows.dtype == torch.bfloat16
        self.packed_rows = (rows.view(torch.int16) if is_bf16 else rows.float()).contiguous().numpy(), is_bf16
        if self.lm_head is None:
            self.packed_head = pack_matrix(self.embeddings.weight)
        for module in self.modules():
            if isinstance(module, Block):
                module.pack(dtype)
        for module in self.modules():
            if isinstance(module, Linear | RMSNorm):
                module.pack()

    def embed(self, token_ids: Tensor) -> Tensor:
        if self.packed_rows is not None:
            return torch.from_numpy(cpu_layers.embed(token_ids.numpy(), *self.packed_rows))
        embedded: Tensor = self.embeddings(token_ids)
        return embedded

    def forward(self, batch: Batch, state: State) -> Tensor:
        """Return the hidden vectors after the final norm: (T, D).

        The recurrent state of requests with drafts does not change before `commit`.
        """
        x_TD = self.embed(batch.token_ids_T)
        for block in self.layers:
            x_TD = block(x_TD, batch, state)
        out: Tensor = self.norm_f(x_TD)
        return out

    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State) -> None:
        """Advance the recurrent state of requests with drafts over all tokens of the last step except rejected drafts.

        `batch` is the batch of the last step; `num_accepted` has the number of accepted drafts of each request.

        The step keeps its inputs, 0.7 MiB per token, and `commit` runs the recurrence over the inputs again. Keeping a
        copy of the state before each draft would need 1 + drafts times the memory of the state for every running
        request: 974 MiB per sequence for Super at 5 drafts.
        """
        chosen = [r for r, drafts in enumerate(batch.num_drafts) if drafts]
        lens = [batch.lens[r] - batch.num_drafts[r] + num_accepted[r] for r in chosen]
        spans = [range(batch.starts[r], batch.starts[r] + length) for r, length in zip(chosen, lens, strict=True)]
        rows = torch.tensor([row for span in spans for row in span], device=batch.token_ids_T.device)
        accepted = Batch(
            batch.token_ids_T[rows],
            tuple(lens),
            tuple(batch.context_lens[r] for r in chosen),
            tuple(batch.slots[r] for r in chosen),
            tuple(batch.block_tables[r] for r in chosen),
        )
        for block in self.layers:
            if isinstance(block, Block) and isinstance(block.mixer, Mamba2Mixer):
                block.mixer.commit(rows, accepted, state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden vectors: (..., D) -> fp32 (..., V)."""
        if self.lm_head is not None:
            logits: Tensor = self.lm_head(hidden)
            return logits.float()
        if self.packed_head is not None:
            return linear(hidden, self.packed_head)
        return F.linear(hidden, self.embeddings.weight).float()

    def draft(self, batch: Batch, hidden_TD: Tensor, state: State) -> Tensor:
        """Run the MTP module for one step and return hidden vectors (T, D); `logits` of these vectors give the drafts.

        - `batch.token_ids_T` are the tokens that follow the positions of `hidden_TD`.
        - `hidden_TD` (T, D) is the output of `forward` or, for the second and later drafts, the output of `draft`.
        """
        assert self.mtp is not None
        out: Tensor = self.mtp(self.embed(batch.token_ids_T), hidden_TD, batch, state)
        return out


# Weights --------------------------------------------------------------------------------------------------------------


def checkpoint_prefix(checkpoint: Checkpoint) -> str:
    """Return the prefix of the backbone's tensor names; raise ValueError if the checkpoint has no embeddings."""
    for prefix in PREFIXES:
        if f"{prefix}embeddings.weight" in checkpoint:
            return prefix
    raise ValueError(f"the checkpoint {checkpoint.path} has no tensor backbone.embeddings.weight")


def tensor_name(parameter_name: str, prefix: str) -> str:
    """Return the name of a parameter's tensor in the checkpoint.

    The names of the head and of the MTP module lack the part "backbone." or "model." at the end of the prefix.
    """
    if parameter_name.startswith(("lm_head.", "mtp.")):
        return prefix.removesuffix("backbone.").removesuffix("model.") + parameter_name
    return prefix + parameter_name


def expert_tensor_names(config: NemotronHConfig, layer: int, expert: int, prefix: str) -> dict[str, str]:
    """Return the tensor names of one routed expert's two matrices in the checkpoint: {"up": …, "down": …}."""
    is_mtp = layer >= config.num_layers
    place = f"mtp.layers.{layer - config.num_layers}" if is_mtp else f"layers.{layer}"
    stem = tensor_name(f"{place}.mixer.experts.{expert}", prefix)
    return {"up": f"{stem}.up_proj.weight", "down": f"{stem}.down_proj.weight"}


def load_expert(checkpoint: Checkpoint, config: NemotronHConfig, layer: int, expert: int) -> dict[str, Tensor]:
    """Read the weights of one routed expert in their stored dtype: {"up": (M, L), "down": (L, M)}.

    Raises ValueError if the model has no such expert.
    """
    shape = next((shape for shape in config.expert_shapes if shape.layer == layer), None)
    if shape is None or not 0 <= expert < shape.num_experts:
        raise ValueError(f"the model has no expert {expert} in layer {layer}")
    names = expert_tensor_names(config, layer, expert, checkpoint_prefix(checkpoint))
    sizes = {"up": (shape.width, shape.input_dim), "down": (shape.input_dim, shape.width)}
    return {part: checkpoint.tensor(name, sizes[part]) for part, name in names.items()}


def has_mtp(checkpoint: Checkpoint, config: NemotronHConfig) -> bool:
    """Return True if drafting is possible: the config asks for an MTP module and the checkpoint has its weights."""
    root = tensor_name("mtp.", checkpoint_prefix(checkpoint))
    return config.num_nextn_predict_layers > 0 and any(name.startswith(root) for name in checkpoint.names)


def served_expert_shapes(checkpoint: Checkpoint, config: NemotronHConfig) -> tuple[ExpertShape, ...]:
    """Return the shapes of all MoE layers for which the checkpoint has weights, also those of the MTP module."""
    num_layers = len(config.layers) if has_mtp(checkpoint, config) else config.num_layers
    return tuple(shape for shape in config.expert_shapes if shape.layer < num_layers)


def has_own_head(checkpoint: Checkpoint, config: NemotronHConfig, reads_weights: bool = True) -> bool:
    """Return True if the head has weights of its own, and does not use the embeddings.

    If the config ties head and embeddings but the checkpoint has weights for both, the head's own weights are served if
    they differ, as transformers does. If they are equal, they are read only once. If `reads_weights` is False, the
    weights are not compared, and are taken to differ.
    """
    prefix = checkpoint_prefix(checkpoint)
    head, embeddings = tensor_name("lm_head.weight", prefix), f"{prefix}embeddings.weight"
    if not config.tie_word_embeddings or head not in checkpoint:
        return not config.tie_word_embeddings
    return not reads_weights or not torch.equal(checkpoint.tensor(head), checkpoint.tensor(embeddings))


def check_names(checkpoint: Checkpoint, config: NemotronHConfig, parameter_names: Iterator[str]) -> None:
    """Raise ValueError with the name of the first tensor that is missing in the checkpoint or unknown to the model."""
    prefix = checkpoint_prefix(checkpoint)
    expected = {tensor_name(name, prefix) for name in parameter_names}
    for shape in served_expert_shapes(checkpoint, config):
        for expert in range(shape.num_experts):
            expected.update(expert_tensor_names(config, shape.layer, expert, prefix).values())
    names = set(checkpoint.names)
    if config.tie_word_embeddings:
        names.discard(tensor_name("lm_head.weight", prefix))  # equal to the embeddings, see `has_own_head`
    if missing := sorted(expected - names):
        raise ValueError(f"the checkpoint {checkpoint.path} has no tensor {missing[0]} ({len(missing)} missing in all)")
    if extra := sorted(names - expected):
        raise ValueError(f"the checkpoint {checkpoint.path} has the unknown tensor {extra[0]} ({len(extra)} in all)")


def load_backbone(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    experts: Experts,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> NemotronH:
    """Load the model without reading its routed experts; the loaded model calls `experts` to run routed experts.

    Weights have `dtype`, except for the parameters in `FP32_PARAMETERS`, with which the reference implementation
    computes in fp32. Raises ValueError if a tensor is missing, is unknown or has the wrong shape.
    """
    config = replace(config, tie_word_embeddings=not has_own_head(checkpoint, config))
    with torch.device("meta"):
        model = NemotronH(config, experts, with_mtp=has_mtp(checkpoint, config))
    weights = {}
    for name, tensor in _backbone_tensors(checkpoint, config, model):
        weights[name] = tensor.to(device, torch.float32 if name.endswith(FP32_PARAMETERS) else dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    model = model.requires_grad_(False).eval()
    if kernels.is_compiled(device):
        model.pack(dtype)
    return model


def _backbone_tensors(
    checkpoint: Checkpoint, config: NemotronHConfig, model: NemotronH
) -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter name, memory-mapped tensor) for every parameter of the model without its routed experts.

    Raises ValueError if a tensor is missing, is unknown or has the wrong shape.
    """
    parameters = model.state_dict()
    check_names(checkpoint, config, iter(parameters))
    prefix = checkpoint_prefix(checkpoint)
    for name, value in parameters.items():
        yield name, checkpoint.tensor(tensor_name(name, prefix), tuple(value.shape))


def check(checkpoint: Checkpoint, config: NemotronHConfig) -> None:
    """Check the names and shapes of all tensors in the checkpoint; the weights are memory-mapped, but not read.

    Raises ValueError if a tensor is missing, is unknown or has the wrong shape; the message names the first such
    tensor.
    """
    config = replace(config, tie_word_embeddings=not has_own_head(checkpoint, config, reads_weights=False))
    with torch.device("meta"):
        model = NemotronH(config, LocalExperts({}), with_mtp=has_mtp(checkpoint, config))
    for _ in _backbone_tensors(checkpoint, config, model):
        pass
    for shape in served_expert_shapes(checkpoint, config):
        for expert in range(shape.num_experts):
            load_expert(checkpoint, config, shape.layer, expert)
