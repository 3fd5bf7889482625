"""A `DeepseekV3Config` holds the config of a DeepSeek-V3 model (V3, R1, V3.1, Moonlight), in any public dialect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from model.configs.config_keys import ConfigKeys, check_mtp_layers, check_router
from model.configs.expert_shape import ExpertShape
from model.configs.matrix_group import MatrixGroup, gated_mlp, merge
from model.configs.mixer_shapes import MLAShape
from model.configs.model_config import common_values
from model.configs.rope_shape import RopeShape, rope_shape
from model.configs.state_spec import StateSpec

FIXED = {  # for each key, the only values that this code supports
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "moe_layer_freq": (1,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
}


@dataclass(frozen=True)
class DeepseekV3Config:
    """A `DeepseekV3Config` holds the checked values of `config.json` and `generation_config.json`.

    The first `first_k_dense_replace` layers have a dense MLP, and all other layers have experts. The MTP module is one
    more layer.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_nextn_predict_layers: int
    mla: MLAShape
    rope: RopeShape
    first_k_dense_replace: int
    intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_json(cls, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> DeepseekV3Config:
        """Create a config from a model's `config.json`, in any public dialect, and its `generation_config.json`.

        Raises ValueError if a key is missing or has a value that is not allowed; the message names the first such key.
        """
        keys = ConfigKeys(raw)
        need = keys.need
        keys.check_fixed(FIXED)
        hidden, num_heads, num_layers = need("hidden_size"), need("num_attention_heads"), need("num_hidden_layers")
        if (given := keys.whole("num_key_value_heads", num_heads)) != num_heads:
            raise ValueError(f"config.json has num_key_value_heads = {given}; supported is num_attention_heads")
        num_dense = keys.whole("first_k_dense_replace")
        rope_dim = need("qk_rope_head_dim")
        return cls(
            num_layers=num_layers,
            mla=MLAShape(
                hidden,
                num_heads,
                keys.whole("q_lora_rank", 0) or None,
                need("kv_lora_rank"),
                need("qk_nope_head_dim"),
                rope_dim,
                need("v_head_dim"),
            ),
            rope=rope_shape(keys, rope_dim, is_interleaved=keys.flag("rope_interleave", True)),
            first_k_dense_replace=num_dense,
            intermediate_size=need("intermediate_size") if num_dense else 0,
            n_routed_experts=need("n_routed_experts"),
            num_experts_per_tok=need("num_experts_per_tok"),
            n_shared_experts=keys.whole("n_shared_experts", 0),
            moe_intermediate_size=need("moe_intermediate_size"),
            routed_scaling_factor=keys.number("routed_scaling_factor"),
            n_group=keys.whole("n_group", 1) or 1,
            topk_group=keys.whole("topk_group", 1) or 1,
            rms_norm_eps=keys.number("rms_norm_eps"),
            **common_values(keys, generation),
        )

    def __post_init__(self) -> None:
        check_mtp_layers(self.num_nextn_predict_layers)
        if (num_dense := self.first_k_dense_replace) >= self.num_layers:
            raise ValueError(f"config.json has first_k_dense_replace = {num_dense}, but only {self.num_layers} layers")
        experts, groups = ("n_routed_experts", self.n_routed_experts), ("n_group", self.n_group)
        check_router(experts, self.num_experts_per_tok, groups, self.topk_group)

    @property
    def num_all_layers(self) -> int:
        """Return the number of layers, the MTP module's layer included."""
        return self.num_layers + self.num_nextn_predict_layers

    @property
    def softmax_scale(self) -> float:
        """Return the factor of the attention scores before the softmax.

        YaRN multiplies the factor by the square of a magnitude if the config gives `mscale_all_dim`.
        """
        yarn = self.rope.yarn
        magnitude = yarn.magnitude(yarn.mscale_all_dim) if yarn and yarn.mscale_all_dim else 1.0
        return float((self.mla.nope_dim + self.mla.rope_dim) ** -0.5 * magnitude**2)

    @cached_property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        sizes = (self.n_routed_experts, self.num_experts_per_tok, self.hidden_size, self.moe_intermediate_size)
        return tuple(
            ExpertShape(layer, *sizes, kind="swiglu", num_groups=self.n_group, top_groups=self.topk_group)
            for layer in range(self.first_k_dense_replace, self.num_all_layers)
        )

    @cached_property
    def matrices(self) -> tuple[MatrixGroup, ...]:
        """Return all weights of the model, and the MTP module's copies of the embedding and of the head."""
        return merge(_matrices(self))

    @cached_property
    def state_spec(self) -> StateSpec:
        return StateSpec(tuple(self.mla.state_spec(layer) for layer in range(self.num_all_layers)), ())

    @property
    def chunk_align(self) -> int:
        """Return 1, as attention can split a prompt at every token."""
        return 1

    @property
    def replay_width(self) -> int:
        """Return 0, as the model has no recurrent layers."""
        return 0


def _matrices(config: DeepseekV3Config) -> Iterator[MatrixGroup]:
    """Yield the weights of a model one by one, but all routed experts of a layer at once."""
    vocab, hidden = config.vocab_size, config.hidden_size
    has_head = not config.tie_word_embeddings
    yield MatrixGroup("embedding", "embed_tokens", vocab, hidden)
    if has_head:
        yield MatrixGroup("head", "lm_head", vocab, hidden)
    yield MatrixGroup("norms", "norm", hidden)
    for layer in range(config.num_all_layers):
        is_mtp = layer >= config.num_layers
        is_dense = layer < config.first_k_dense_replace
        mlp = gated_mlp("dense", "mlp", hidden, config.intermediate_size) if is_dense else _moe_matrices(config)
        yield from (replace(one, is_mtp=is_mtp) for one in (*_mla_matrices(config.mla), *mlp))
    if config.num_nextn_predict_layers:
        yield MatrixGroup("copies", "embed_tokens", vocab, hidden, is_mtp=True)
        if has_head:
            yield MatrixGroup("copies", "shared_head.head", vocab, hidden, is_mtp=True)
        yield MatrixGroup("mixers", "eh_proj", hidden, 2 * hidden, is_mtp=True)
        yield from (MatrixGroup("norms", name, hidden, is_mtp=True) for name in ("enorm", "hnorm", "shared_head.norm"))


def _mla_matrices(shape: MLAShape) -> Iterator[MatrixGroup]:
    """Yield the weights of an attention layer with the two norms of the layer."""

    def matrix(name: str, rows: int, columns: int) -> MatrixGroup:
        return MatrixGroup("mixers", f"self_attn.{name}", rows, columns)

    hidden, heads, rank = shape.hidden_size, shape.num_heads, shape.query_rank
    yield from (MatrixGroup("norms", name, hidden) for name in ("input_layernorm", "post_attention_layernorm"))
    queries = heads * (shape.nope_dim + shape.rope_dim)
    if rank:
        yield matrix("q_a_proj", rank, hidden)
        yield MatrixGroup("norms", "self_attn.q_a_layernorm", rank)
        yield matrix("q_b_proj", queries, rank)
    else:
        yield matrix("q_proj", queries, hidden)
    yield matrix("kv_a_proj_with_mqa", shape.kv_rank + shape.rope_dim, hidden)
    yield MatrixGroup("norms", "self_attn.kv_a_layernorm", shape.kv_rank)
    yield matrix("kv_b_proj", heads * (shape.nope_dim + shape.value_dim), shape.kv_rank)
    yield matrix("o_proj", hidden, heads * shape.value_dim)


def _moe_matrices(config: DeepseekV3Config) -> Iterator[MatrixGroup]:
    hidden, width, num_experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield MatrixGroup("routers", "mlp.gate", num_experts, hidden)
    yield MatrixGroup("routers", "mlp.gate.e_score_correction_bias", num_experts)
    if config.n_shared_experts:
        yield from gated_mlp("shared", "mlp.shared_experts", hidden, config.n_shared_experts * width)
    yield from gated_mlp("routed", "mlp.experts", hidden, width, num_experts)
