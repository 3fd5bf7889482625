"""A `NemotronHConfig` holds the config of a Nemotron 3 model (Super, Nano or Ultra), in any public dialect."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from model.configs.expert_shape import ExpertShape
from model.configs.mixer_shapes import AttentionShape, MambaShape
from model.configs.model_config import eos_token_ids
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
            eos_token_ids=eos_token_ids({"generation_config.json": generation or {}, "config.json": raw}),
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
            most = self.topk_group * (self.n_routed_experts // self.n_group)
            if self.num_experts_per_tok > most:
                picks = f"num_experts_per_tok = {self.num_experts_per_tok}"
                raise ValueError(f"config.json has {picks}, but topk_group allows only {most} experts per token")

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
    def chunk_align(self) -> int:
        """Return the number of tokens at whose multiples a prompt may be split between steps: Mamba-2's chunk size."""
        return self.mamba.chunk_size

    @property
    def replay_width(self) -> int:
        """Return the values per token that all Mamba-2 layers keep of a step with drafts; see `ModelConfig`."""
        return self.layers.count("M") * self.mamba.replay_width
