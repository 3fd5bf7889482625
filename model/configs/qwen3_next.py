"""A `Qwen3NextConfig` holds the config of a Qwen3-Next model (Qwen3-Coder-Next), in any public dialect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from model.configs.config_keys import ConfigKeys, check_divides, check_mtp_layers, check_router
from model.configs.expert_shape import ExpertShape
from model.configs.matrix_group import MatrixGroup, gated_mlp, merge
from model.configs.mixer_shapes import AttentionShape, DeltaNetShape
from model.configs.model_config import common_values
from model.configs.rope_shape import RopeShape, rope_shape
from model.configs.state_spec import StateSpec

FIXED = {  # for each key, the only values that this code supports
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False, None),
    "attn_output_gate": (True,),  # this key and the next stand in configs of related families
    "scoring_func": ("softmax",),
}
FULL, LINEAR = "full_attention", "linear_attention"
INTERVAL = 4  # `full_attention_interval` if the config has neither this key nor `layer_types`
ROTATED = 0.25  # `partial_rotary_factor` if the config does not have this key


def _layer_types(keys: ConfigKeys, num_layers: int) -> tuple[str, ...]:
    """Return the type of each layer's mixer, from the list or from the interval in the config."""
    types = keys.items("layer_types", str)
    if not types:
        interval = keys.whole("full_attention_interval", INTERVAL) or INTERVAL
        return tuple(LINEAR if (layer + 1) % interval else FULL for layer in range(num_layers))
    if len(types) != num_layers or not {*types} <= {FULL, LINEAR}:
        raise keys.wrong("layer_types", f"allowed is a list of {num_layers} names, each {LINEAR} or {FULL}")
    return tuple(types)


@dataclass(frozen=True)
class Qwen3NextConfig:
    """A `Qwen3NextConfig` holds the checked values of `config.json` and `generation_config.json`.

    `layer_types` and `moe_layers` leave the MTP module out. The module is one layer with full attention and experts.
    Public configs do not tell if a checkpoint has the module, but its tensors do, so `num_nextn_predict_layers` is 0
    unless the caller of `from_json` sets this key.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    num_nextn_predict_layers: int
    attention: AttentionShape
    rope: RopeShape
    delta_net: DeltaNetShape
    moe_layers: tuple[int, ...]
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_json(cls, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> Qwen3NextConfig:
        """Create a config from a model's `config.json`, in any public dialect, and its `generation_config.json`.

        Raises ValueError if a key is missing or has a value that is not allowed; the message names the first such key.
        """
        keys = ConfigKeys(raw)
        need = keys.need
        keys.check_fixed(FIXED)
        hidden, num_layers, head_dim = need("hidden_size"), need("num_hidden_layers"), need("head_dim")
        step = 1 if keys.raw.get("decoder_sparse_step") is None else need("decoder_sparse_step")
        dense_only = keys.items("mlp_only_layers", int)
        moe_layers = tuple(layer for layer in range(num_layers) if layer not in dense_only and (layer + 1) % step == 0)
        num_heads = need("num_attention_heads")
        num_kv_heads = keys.whole("num_key_value_heads", 0) or num_heads
        return cls(
            layer_types=_layer_types(keys, num_layers),
            attention=AttentionShape(hidden, num_heads, num_kv_heads, head_dim),
            rope=rope_shape(keys, head_dim, ROTATED),
            delta_net=DeltaNetShape(
                hidden,
                need("linear_num_key_heads"),
                need("linear_num_value_heads"),
                need("linear_key_head_dim"),
                need("linear_value_head_dim"),
                need("linear_conv_kernel_dim"),
            ),
            moe_layers=moe_layers,
            intermediate_size=need("intermediate_size") if len(moe_layers) < num_layers else 0,
            num_experts=need("num_experts"),
            num_experts_per_tok=need("num_experts_per_tok"),
            moe_intermediate_size=need("moe_intermediate_size"),
            shared_expert_intermediate_size=need("shared_expert_intermediate_size"),
            rms_norm_eps=keys.number("rms_norm_eps"),
            **common_values(keys, generation),
        )

    def __post_init__(self) -> None:
        check_mtp_layers(self.num_nextn_predict_layers)
        attention, delta_net = self.attention, self.delta_net
        check_divides("num_attention_heads", attention.num_heads, "num_key_value_heads", attention.num_kv_heads)
        heads = (delta_net.num_value_heads, "linear_num_key_heads", delta_net.num_key_heads)
        check_divides("linear_num_value_heads", *heads)
        check_router(("num_experts", self.num_experts), self.num_experts_per_tok)

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def n_group(self) -> int:
        """Return 1, as the router does not divide experts into groups."""
        return 1

    @property
    def topk_group(self) -> int:
        return 1

    @cached_property
    def _mtp_layers(self) -> range:
        return range(self.num_layers, self.num_layers + self.num_nextn_predict_layers)

    @cached_property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        sizes = (self.num_experts, self.num_experts_per_tok, self.hidden_size, self.moe_intermediate_size)
        return tuple(ExpertShape(layer, *sizes, kind="swiglu") for layer in (*self.moe_layers, *self._mtp_layers))

    @cached_property
    def matrices(self) -> tuple[MatrixGroup, ...]:
        """Return all weights of the model; see `ModelConfig`."""
        return merge(_matrices(self))

    @cached_property
    def state_spec(self) -> StateSpec:
        full = [layer for layer, kind in enumerate(self.layer_types) if kind == FULL]
        linear = [layer for layer, kind in enumerate(self.layer_types) if kind == LINEAR]
        return StateSpec(
            tuple(self.attention.state_spec(layer) for layer in (*full, *self._mtp_layers)),
            tuple(self.delta_net.state_spec(layer) for layer in linear),
        )

    @property
    def chunk_align(self) -> int:
        """Return 1, as the recurrence can split a prompt at every token."""
        return 1

    @property
    def replay_width(self) -> int:
        """Return the values per token that all DeltaNet layers keep of a step with drafts; see `ModelConfig`."""
        return self.layer_types.count(LINEAR) * self.delta_net.replay_width


def _matrices(config: Qwen3NextConfig) -> Iterator[MatrixGroup]:
    """Yield the weights of a model one by one, but all routed experts of a layer at once."""
    vocab, hidden = config.vocab_size, config.hidden_size
    yield MatrixGroup("embedding", "embed_tokens", vocab, hidden)
    if not config.tie_word_embeddings:
        yield MatrixGroup("head", "lm_head", vocab, hidden)
    yield MatrixGroup("norms", "norm", hidden)
    for layer, kind in enumerate(config.layer_types):
        yield from _layer_matrices(config, kind == FULL, layer in config.moe_layers)
    if config.num_nextn_predict_layers:
        yield from (replace(one, is_mtp=True) for one in _layer_matrices(config, is_full=True, is_moe=True))
        yield MatrixGroup("mixers", "fc", hidden, 2 * hidden, is_mtp=True)
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        yield from (MatrixGroup("norms", name, hidden, is_mtp=True) for name in norms)


def _layer_matrices(config: Qwen3NextConfig, is_full: bool, is_moe: bool) -> Iterator[MatrixGroup]:
    hidden = config.hidden_size
    yield from (MatrixGroup("norms", name, hidden) for name in ("input_layernorm", "post_attention_layernorm"))
    yield from _attention_matrices(config.attention) if is_full else _delta_net_matrices(config.delta_net)
    if not is_moe:
        yield from gated_mlp("dense", "mlp", hidden, config.intermediate_size)
        return
    yield MatrixGroup("routers", "mlp.gate", config.num_experts, hidden)
    yield from gated_mlp("shared", "mlp.shared_expert", hidden, config.shared_expert_intermediate_size)
    yield MatrixGroup("shared", "mlp.shared_expert_gate", 1, hidden)
    yield from gated_mlp("routed", "mlp.experts", hidden, config.moe_intermediate_size, config.num_experts)


def _attention_matrices(shape: AttentionShape) -> Iterator[MatrixGroup]:
    """Yield the weights of an attention layer, whose query projection also gives a gate of the same size."""
    queries, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for name, rows in (("q_proj", 2 * queries), ("k_proj", kv), ("v_proj", kv)):
        yield MatrixGroup("mixers", f"self_attn.{name}", rows, shape.hidden_size)
    yield MatrixGroup("mixers", "self_attn.o_proj", shape.hidden_size, queries)
    yield from (MatrixGroup("norms", f"self_attn.{name}", shape.head_dim) for name in ("q_norm", "k_norm"))


def _delta_net_matrices(shape: DeltaNetShape) -> Iterator[MatrixGroup]:
    hidden, values = shape.hidden_size, shape.values_dim
    yield MatrixGroup("mixers", "linear_attn.in_proj_qkvz", shape.conv_dim + values, hidden)
    yield MatrixGroup("mixers", "linear_attn.in_proj_ba", 2 * shape.num_value_heads, hidden)
    yield MatrixGroup("mixers", "linear_attn.conv1d", shape.conv_dim, shape.conv_kernel)
    yield from (MatrixGroup("mixers", f"linear_attn.{name}", shape.num_value_heads) for name in ("A_log", "dt_bias"))
    yield MatrixGroup("norms", "linear_attn.norm", shape.value_dim)
    yield MatrixGroup("mixers", "linear_attn.out_proj", hidden, values)
