"""A `NemotronHConfig` holds the config of a Nemotron 3 model (Super, Nano or Ultra), in any public dialect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from model.configs.config_keys import ConfigKeys, check_divides, check_mtp_layers, check_router
from model.configs.expert_shape import ExpertShape
from model.configs.matrix_group import MatrixGroup, merge
from model.configs.mixer_shapes import AttentionShape, MambaShape
from model.configs.model_config import common_values
from model.configs.state_spec import StateSpec

LETTERS = {
    "M": ("mamba", "linear_attention"),
    "E": ("moe",),
    "*": ("attention", "full_attention"),
    "-": ("mlp",),
}
FIXED = {  # for each key, the only value that this code supports; `from_json` raises ValueError for another value
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "n_shared_experts": (1,),
}


def _pattern(keys: ConfigKeys, prefix: str) -> str:
    """Return the layer pattern as a string of letters, or "" if the config has no layer pattern.

    `prefix` is "" for the backbone's pattern and "mtp_" for the MTP module's pattern. A config gives the pattern as
    letters, or as a list of old or new layer names.
    """
    if pattern := keys.raw.get(f"{prefix}hybrid_override_pattern"):
        for letter in str(pattern):
            if letter not in LETTERS:
                raise ValueError(f"{prefix}hybrid_override_pattern has the layer {letter!r}; allowed are M, E, * and -")
        return str(pattern)
    letters = {name: letter for letter, aliases in LETTERS.items() for name in aliases}
    names = keys.items(f"{prefix}layers_block_type", str)
    for name in names:
        if name not in letters:
            raise ValueError(f"{prefix}layers_block_type has the layer {name!r}; allowed are {', '.join(letters)}")
    return "".join(letters[name] for name in names)


def _delta_limit(keys: ConfigKeys) -> tuple[float, float]:
    """Return the lower and the upper limit of Δ in the Mamba-2 layers."""
    limit = keys.raw.get("time_step_limit") or (0.0, float("inf"))
    if not isinstance(limit, list | tuple) or [isinstance(end, int | float) for end in limit] != [True, True]:
        raise keys.wrong("time_step_limit", "allowed is a list of two numbers")
    if not limit[0] <= limit[1]:  # also refuses NaN
        raise keys.wrong("time_step_limit", "allowed are two numbers of which the second is not smaller")
    return float(limit[0]), float(limit[1])


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
    eos_token_ids: tuple[int, ...]  # end tokens of both configs; `ModelFamily.eos_token_ids` adds the tokenizer's

    @classmethod
    def from_json(cls, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> NemotronHConfig:
        """Create a config from a model's `config.json`, in any public dialect, and its `generation_config.json`.

        Raises ValueError if a key is missing or has a value that is not allowed; the message names the first such key.
        """
        keys = ConfigKeys(raw)
        need = keys.need
        keys.check_fixed(FIXED)
        pattern = _pattern(keys, "")
        if not pattern:
            raise ValueError("config.json lacks the key hybrid_override_pattern (or layers_block_type)")
        if (given := keys.whole("num_hidden_layers", len(pattern))) != len(pattern):
            raise ValueError(f"config.json has num_hidden_layers = {given}, but a pattern of {len(pattern)} layers")
        mtp_pattern = _pattern(keys, "mtp_") or "*E"
        letters = {*pattern, *(mtp_pattern if keys.whole("num_nextn_predict_layers", 0) else "")}
        hidden = need("hidden_size")
        mamba = MambaShape(
            hidden,
            need("mamba_num_heads"),
            need("mamba_head_dim"),
            need("mamba_n_groups", "n_groups"),
            need("ssm_state_size"),
            need("mamba_d_conv", "conv_kernel"),
            need("mamba_chunk_size", "chunk_size"),
            _delta_limit(keys),
        )
        num_heads = need("num_attention_heads")
        num_kv_heads = keys.whole("num_key_value_heads", 0) or num_heads
        has_moe = "E" in letters
        return cls(
            pattern=pattern,
            mtp_pattern=mtp_pattern,
            mamba=mamba,
            attention=AttentionShape(hidden, num_heads, num_kv_heads, need("head_dim")),
            intermediate_size=need("intermediate_size") if "-" in letters else 0,
            n_routed_experts=need("n_routed_experts") if has_moe else 0,
            num_experts_per_tok=need("num_experts_per_tok") if has_moe else 0,
            moe_intermediate_size=need("moe_intermediate_size") if has_moe else 0,
            moe_shared_expert_intermediate_size=need("moe_shared_expert_intermediate_size") if has_moe else 0,
            moe_latent_size=need("moe_latent_size") if raw.get("moe_latent_size") else None,
            routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
            n_group=keys.whole("n_group", 1) or 1,
            topk_group=keys.whole("topk_group", 1) or 1,
            layer_norm_epsilon=keys.number("layer_norm_epsilon", keys.number("norm_eps", 1e-5)),
            use_conv_bias=keys.flag("use_conv_bias", True),
            use_bias=keys.flag("use_bias", False) or keys.flag("mamba_proj_bias", False),
            attention_bias=keys.flag("attention_bias", False),
            mlp_bias=keys.flag("mlp_bias", False),
            **common_values(keys, generation),
        )

    def __post_init__(self) -> None:
        check_mtp_layers(self.num_nextn_predict_layers)
        if "M" in self.layers[self.num_layers :]:  # the state would keep rejected drafts
            layers = self.mtp_pattern
            raise ValueError(f"config.json has an MTP module with the layers {layers}; allowed are E, * and -")
        mamba, attention = self.mamba, self.attention
        check_divides("mamba_num_heads", mamba.num_heads, "n_groups", mamba.num_groups)
        check_divides("num_attention_heads", attention.num_heads, "num_key_value_heads", attention.num_kv_heads)
        if "E" in self.layers:
            experts, groups = ("n_routed_experts", self.n_routed_experts), ("n_group", self.n_group)
            check_router(experts, self.num_experts_per_tok, groups, self.topk_group)

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
        return tuple(
            ExpertShape(layer, *sizes, num_groups=self.n_group, top_groups=self.topk_group)
            for layer, letter in enumerate(self.layers)
            if letter == "E"
        )

    @cached_property
    def matrices(self) -> tuple[MatrixGroup, ...]:
        """Return all weights of the model; see `ModelConfig`."""
        return merge(_matrices(self))

    @cached_property
    def state_spec(self) -> StateSpec:
        return StateSpec(
            tuple(self.attention.state_spec(layer) for layer, letter in enumerate(self.layers) if letter == "*"),
            tuple(self.mamba.state_spec(layer) for layer, letter in enumerate(self.layers) if letter == "M"),
        )

    @property
    def chunk_align(self) -> int:
        """Return the number of tokens at whose multiples a prompt may be split between steps: Mamba-2's chunk size."""
        return self.mamba.chunk_size

    @property
    def replay_width(self) -> int:
        """Return the values per token that all Mamba-2 layers keep of a step with drafts; see `ModelConfig`."""
        return self.layers.count("M") * self.mamba.replay_width


def _matrices(config: NemotronHConfig) -> Iterator[MatrixGroup]:
    """Yield the weights of a model one by one, but all routed experts of a layer at once."""
    hidden, last = config.hidden_size, len(config.layers) - 1
    yield MatrixGroup("embedding", "embeddings", config.vocab_size, hidden)
    if not config.tie_word_embeddings:
        yield MatrixGroup("head", "lm_head", config.vocab_size, hidden)
    yield MatrixGroup("norms", "norm_f", hidden)
    for layer, letter in enumerate(config.layers):
        is_mtp = layer >= config.num_layers
        yield MatrixGroup("norms", "norm", hidden, is_mtp=is_mtp)
        yield from (replace(one, is_mtp=is_mtp) for one in _mixer_matrices(config, letter))
        if layer == config.num_layers:
            yield MatrixGroup("mixers", "eh_proj", hidden, 2 * hidden, is_mtp=True)
            yield from (MatrixGroup("norms", name, hidden, is_mtp=True) for name in ("enorm", "hnorm"))
        if is_mtp and layer == last:
            yield MatrixGroup("norms", "final_layernorm", hidden, is_mtp=True)


def _mixer_matrices(config: NemotronHConfig, letter: str) -> Iterator[MatrixGroup]:
    """Yield the weights of a layer of the kind `letter` without its norm."""
    match letter:
        case "M":
            yield from _mamba_matrices(config)
        case "*":
            shape = config.attention
            queries, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
            rows = {"q": queries, "k": kv, "v": kv}
            for name, num in rows.items():
                yield from _linear("mixers", f"mixer.{name}_proj", num, config.hidden_size, config.attention_bias)
            yield from _linear("mixers", "mixer.o_proj", config.hidden_size, queries, config.attention_bias)
        case "-":
            yield from _mlp_matrices(config, "dense", "mixer", config.intermediate_size)
        case _:
            yield from _moe_matrices(config)


def _linear(part: str, role: str, rows: int, columns: int, has_bias: bool) -> Iterator[MatrixGroup]:
    yield MatrixGroup(part, role, rows, columns)
    if has_bias:
        yield MatrixGroup(part, f"{role}.bias", rows)


def _mamba_matrices(config: NemotronHConfig) -> Iterator[MatrixGroup]:
    shape, hidden = config.mamba, config.hidden_size
    yield from _linear(
        "mixers", "mixer.in_proj", shape.inner_dim + shape.conv_dim + shape.num_heads, hidden, config.use_bias
    )
    yield from _linear("mixers", "mixer.out_proj", hidden, shape.inner_dim, config.use_bias)
    yield from _linear("mixers", "mixer.conv1d", shape.conv_dim, shape.conv_kernel, config.use_conv_bias)
    yield from (MatrixGroup("mixers", f"mixer.{name}", shape.num_heads) for name in ("A_log", "D", "dt_bias"))
    yield MatrixGroup("norms", "mixer.norm", shape.inner_dim)


def _mlp_matrices(config: NemotronHConfig, part: str, module: str, width: int) -> Iterator[MatrixGroup]:
    """Yield the weights of an MLP of two matrices, from the hidden width to `width` numbers and back."""
    yield from _linear(part, f"{module}.up_proj", width, config.hidden_size, config.mlp_bias)
    yield from _linear(part, f"{module}.down_proj", config.hidden_size, width, config.mlp_bias)


def _moe_matrices(config: NemotronHConfig) -> Iterator[MatrixGroup]:
    hidden, latent, num_experts = config.hidden_size, config.moe_latent_size, config.n_routed_experts
    yield MatrixGroup("routers", "mixer.gate", num_experts, hidden)
    yield MatrixGroup("routers", "mixer.gate.e_score_correction_bias", num_experts)
    shared_width = config.moe_shared_expert_intermediate_size
    yield from _mlp_matrices(config, "shared", "mixer.shared_experts", shared_width)
    if latent:
        yield from _linear("latent", "mixer.fc1_latent_proj", latent, hidden, config.mlp_bias)
        yield from _linear("latent", "mixer.fc2_latent_proj", hidden, latent, config.mlp_bias)
    width = config.moe_intermediate_size
    yield MatrixGroup("routed", "mixer.experts.up_proj", width, latent or hidden, num_experts)
    yield MatrixGroup("routed", "mixer.experts.down_proj", latent or hidden, width, num_experts)
