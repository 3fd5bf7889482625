"""Model configs are public `config.json` files, from which `model_sizes` computes the sizes of a model.

The model types `nemotron_h`, `deepseek_v3` and `qwen3_next` are supported.

Two things are assumed where a config says nothing:

- Linear maps have no bias.
- The checkpoint contains an MTP module, which drafts tokens, only if the config sets `num_nextn_predict_layers`. A
  Qwen3-Next config does not have this key, and the checkpoint of Qwen3-Coder-Next is believed to contain no MTP module.

Legend: D: hidden width. L: width of an expert's input. M: width inside an expert. E: experts. K: taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cluster.sizing.config_keys import ConfigKeys
from cluster.sizing.model_sizes import ExpertSizes, Matrices, ModelSizes, StateSizes
from cluster.sizing.weight_formats import DTYPES, known_counts

LETTERS = {
    **dict.fromkeys(("mamba", "linear_attention"), "M"),
    **dict.fromkeys(("attention", "full_attention"), "*"),
    "moe": "E",
    "mlp": "-",
}


def model_sizes(raw: Mapping[str, Any]) -> ModelSizes:
    """Return the sizes of the model that a parsed `config.json` describes.

    Raises ValueError that names the key if a key is missing or has a value that is not allowed.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json has model_type = {model_type!r}; supported are {', '.join(FAMILIES)}")
    keys = ConfigKeys(raw)
    matrices, experts, state = FAMILIES[model_type](keys)
    if not experts.layers:
        raise ValueError("config.json describes no layer with routed experts, so there is nothing to put on shards")
    if experts.top_k > experts.num_experts:
        raise ValueError(f"config.json has num_experts_per_tok = {experts.top_k}, but {experts.num_experts} experts")
    counts = {dtype: known for dtype in DTYPES if (known := known_counts(raw, dtype)) is not None}
    longest = keys.whole("max_position_embeddings", 0)
    return ModelSizes(model_type, keys.need("hidden_size"), longest or None, tuple(matrices), experts, state, counts)


Family = tuple[list[Matrices], ExpertSizes, StateSizes]


def _vector(part: str, size: int, count: int = 1, role: str = "vector") -> Matrices:
    return Matrices(part, role, size, 1, count)


def _ends(keys: ConfigKeys) -> list[Matrices]:
    """Return the embedding, the head (unless it is tied to the embedding) and the final norm."""
    vocab, hidden = keys.need("vocab_size"), keys.need("hidden_size")
    head = [] if keys.flag("tie_word_embeddings", False) else [Matrices("head", "head", vocab, hidden, 1)]
    return [Matrices("embedding", "embedding", vocab, hidden, 1), *head, _vector("norms", hidden)]


def _of_mtp(matrices: Iterable[Matrices]) -> list[Matrices]:
    return [replace(one, is_mtp=True) for one in matrices]


# Nemotron -------------------------------------------------------------------------------------------------------------


def pattern_of(keys: ConfigKeys, prefix: str = "") -> str:
    """Return one letter per layer (M Mamba-2, E MoE, * attention, - MLP); "" if the config lists no layers.

    Some configs list the layers as letters, others as names.
    """
    text, names = keys.raw.get(f"{prefix}hybrid_override_pattern"), keys.items(f"{prefix}layers_block_type", str)
    if text:
        if wrong := [letter for letter in str(text) if letter not in "ME*-"]:
            raise ValueError(f"{prefix}hybrid_override_pattern has the layer {wrong[0]!r}; allowed are M, E, * and -")
        return str(text)
    if wrong := [name for name in names if name not in LETTERS]:
        raise ValueError(f"{prefix}layers_block_type has the layer {wrong[0]!r}; allowed are {', '.join(LETTERS)}")
    return "".join(LETTERS[name] for name in names)


def _nemotron(keys: ConfigKeys) -> Family:
    hidden, pattern = keys.need("hidden_size"), pattern_of(keys)
    if not pattern:
        raise ValueError("config.json lacks the key hybrid_override_pattern (or layers_block_type)")
    if (given := keys.whole("num_hidden_layers", len(pattern))) != len(pattern):
        raise ValueError(f"config.json has num_hidden_layers = {given}, but a pattern of {len(pattern)} layers")
    has_mtp = keys.upto("num_nextn_predict_layers", 0, 1) == 1
    drafts = (pattern_of(keys, "mtp_") or "*E") if has_mtp else ""
    matrices = _ends(keys) + _nemotron_layers(keys, pattern)
    if has_mtp:
        fused = Matrices("mixers", "fused", hidden, 2 * hidden, 1)
        matrices += _of_mtp([*_nemotron_layers(keys, drafts), fused, _vector("norms", hidden, 3)])
    layers = [layer for layer, letter in enumerate(pattern + drafts) if letter == "E"]
    latent = keys.whole("moe_latent_size", 0) or hidden
    num_experts, top_k, width = (
        keys.need(key) if layers else 1 for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    )
    experts = ExpertSizes(tuple(layers), drafts.count("E"), num_experts, top_k, latent, width, 2)
    kv = 2 * _kv_heads(keys) * keys.need("head_dim") if "*" in pattern + drafts else 0
    if "M" not in pattern:
        return matrices, experts, StateSizes(kv * pattern.count("*"), kv * drafts.count("*"))
    heads, head_dim, state, taps = _mamba(keys)
    inner, conv, num = heads * head_dim, _conv_dim(keys), pattern.count("M")
    return (
        matrices,
        experts,
        StateSizes(
            kv * pattern.count("*"),
            kv * drafts.count("*"),
            num * inner * state,
            num * (taps - 1) * conv,
            num * (inner + conv + heads),
        ),
    )


def _kv_heads(keys: ConfigKeys) -> int:
    return keys.whole("num_key_value_heads", 0) or keys.need("num_attention_heads")


def _mamba(keys: ConfigKeys) -> tuple[int, ...]:
    """Return the number of heads, the head dim, the state dim and the taps of the Mamba-2 layers."""
    taps = keys.whole("mamba_d_conv", 0) or keys.need("conv_kernel")
    return keys.need("mamba_num_heads"), keys.need("mamba_head_dim"), keys.need("ssm_state_size"), taps


def _conv_dim(keys: ConfigKeys) -> int:
    heads, head_dim, state, _ = _mamba(keys)
    groups = keys.whole("mamba_n_groups", 0) or keys.need("n_groups")
    if heads % groups:
        raise ValueError(f"config.json has mamba_num_heads = {heads}, which n_groups = {groups} does not divide")
    return heads * head_dim + 2 * groups * state


def _nemotron_layers(keys: ConfigKeys, pattern: str) -> list[Matrices]:
    """Return the matrices of the layers in `pattern`; each layer consists of one norm and one mixer."""
    hidden = keys.need("hidden_size")
    found = [_vector("norms", hidden, len(pattern))]
    if num := pattern.count("M"):
        heads, head_dim, _, taps = _mamba(keys)
        inner, conv = heads * head_dim, _conv_dim(keys)
        found += [
            Matrices("mixers", "mixer_in", inner + conv + heads, hidden, num),
            Matrices("mixers", "mixer_out", hidden, inner, num),
            Matrices("mixers", "conv", conv, taps, num),
            _vector("mixers", conv, num if keys.flag("use_conv_bias", True) else 0),
            _vector("mixers", heads, 3 * num),  # The vectors A and D, and the bias of Δ.
            _vector("norms", inner, num),
        ]
    if num := pattern.count("*"):
        head_dim = keys.need("head_dim")
        queries, kv = keys.need("num_attention_heads") * head_dim, _kv_heads(keys) * head_dim
        found += [
            Matrices("mixers", "attention", queries, hidden, num),
            Matrices("mixers", "attention", kv, hidden, 2 * num),
            Matrices("mixers", "attention_out", hidden, queries, num),
        ]
    if num := pattern.count("-"):
        width = keys.need("intermediate_size")
        found += [Matrices("dense", "dense", *shape, num) for shape in ((width, hidden), (hidden, width))]
    if num := pattern.count("E"):
        num_experts, width = keys.need("n_routed_experts"), keys.need("moe_intermediate_size")
        latent, shared = keys.whole("moe_latent_size", 0), keys.need("moe_shared_expert_intermediate_size")
        if (num_shared := keys.whole("n_shared_experts", 1)) != 1:
            raise ValueError(f"config.json has n_shared_experts = {num_shared}; supported is 1")
        found += [
            Matrices("routers", "router", num_experts, hidden, num),
            _vector("routers", num_experts, num, "fp32"),
            Matrices("shared", "shared_up", shared, hidden, num),
            Matrices("shared", "shared_down", hidden, shared, num),
            Matrices("routed", "routed", width, latent or hidden, num * num_experts),
            Matrices("routed", "routed", latent or hidden, width, num * num_experts),
        ]
        if latent:
            found.append(Matrices("latent", "latent_in", latent, hidden, num))
            found.append(Matrices("latent", "latent_out", hidden, latent, num))
    return found


# DeepSeek-V3 ----------------------------------------------------------------------------------------------------------


def _deepseek(keys: ConfigKeys) -> Family:
    hidden, num_layers = keys.need("hidden_size"), keys.need("num_hidden_layers")
    num_dense, num_mtp = keys.whole("first_k_dense_replace", 0), keys.upto("num_nextn_predict_layers", 0, 1)
    if num_dense >= num_layers:
        raise ValueError(f"config.json has first_k_dense_replace = {num_dense}, but only {num_layers} layers")
    if keys.whole("moe_layer_freq", 1) != 1:
        raise ValueError(f"config.json has moe_layer_freq = {keys.raw['moe_layer_freq']!r}; supported is 1")
    num_experts, top_k = keys.need("n_routed_experts"), keys.need("num_experts_per_tok")
    width, num_moe = keys.need("moe_intermediate_size"), num_layers - num_dense
    matrices = [
        *_ends(keys),
        *_mla(keys, num_layers),
        *(_gated("dense", "dense", hidden, keys.need("intermediate_size"), num_dense) if num_dense else []),
        *_deepseek_moe(keys, num_moe),
    ]
    if num_mtp:
        copies = [replace(one, part="copies") for one in _ends(keys) if one.part != "norms"]
        joined = [Matrices("mixers", "fused", hidden, 2 * hidden, 1), _vector("norms", hidden, 3)]
        matrices += _of_mtp([*copies, *joined, *_mla(keys, 1), *_deepseek_moe(keys, 1)])
    layers = tuple(range(num_dense, num_layers + num_mtp))
    experts = ExpertSizes(layers, num_mtp, num_experts, top_k, hidden, width, 3)
    latent = keys.need("kv_lora_rank") + keys.need("qk_rope_head_dim")
    return matrices, experts, StateSizes(latent * num_layers, latent * num_mtp)


def _mla(keys: ConfigKeys, num: int) -> list[Matrices]:
    """Return the matrices and norms of `num` layers with MLA, which is attention over a compressed latent."""
    hidden, heads = keys.need("hidden_size"), keys.need("num_attention_heads")
    nope, rope, value = (keys.need(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query_rank, kv_rank = keys.whole("q_lora_rank", 0), keys.need("kv_lora_rank")
    shapes = [
        (kv_rank + rope, hidden),
        (heads * (nope + value), kv_rank),
        (heads * (nope + rope), query_rank or hidden),
    ]
    shapes += [(query_rank, hidden)] if query_rank else []
    return [
        *(Matrices("mixers", "attention", *shape, num) for shape in shapes),
        Matrices("mixers", "attention_out", hidden, heads * value, num),
        _vector("norms", query_rank + kv_rank + 2 * hidden, num),
    ]


def _gated(part: str, role: str, hidden: int, width: int, num: int) -> list[Matrices]:
    """Return the gate, up and down matrices of `num` gated MLPs."""
    up, down = (f"{role}_up", f"{role}_down") if role == "shared" else (role, role)
    return [Matrices(part, up, width, hidden, 2 * num), Matrices(part, down, hidden, width, num)]


def _deepseek_moe(keys: ConfigKeys, num: int) -> list[Matrices]:
    hidden, num_experts, width = (
        keys.need(key) for key in ("hidden_size", "n_routed_experts", "moe_intermediate_size")
    )
    num_shared = keys.whole("n_shared_experts", 0)
    return [
        Matrices("routers", "router", num_experts, hidden, num),
        _vector("routers", num_experts, num, "fp32"),
        *(_gated("shared", "shared", hidden, num_shared * width, num) if num_shared else []),
        *_gated("routed", "routed", hidden, width, num * num_experts),
    ]


# Qwen3-Next -----------------------------------------------------------------------------------------------------------


def _qwen(keys: ConfigKeys) -> Family:
    hidden, num_layers = keys.need("hidden_size"), keys.need("num_hidden_layers")
    num_full = _qwen_kinds(keys, num_layers).count("full_attention")
    num_linear, num_mtp = num_layers - num_full, keys.upto("num_nextn_predict_layers", 0, 1)
    step, dense_only = keys.whole("decoder_sparse_step", 1) or 1, keys.items("mlp_only_layers", int)
    moe = [layer for layer in range(num_layers) if layer not in dense_only and (layer + 1) % step == 0]
    num_experts, top_k = keys.need("num_experts"), keys.need("num_experts_per_tok")
    key_heads, value_heads = keys.need("linear_num_key_heads"), keys.need("linear_num_value_heads")
    keys_dim = key_heads * keys.need("linear_key_head_dim")
    values_dim = value_heads * keys.need("linear_value_head_dim")
    conv, taps = 2 * keys_dim + values_dim, keys.need("linear_conv_kernel_dim")
    num_dense = num_layers - len(moe)
    matrices = [
        *_ends(keys),
        Matrices("mixers", "mixer_in", conv + values_dim, hidden, num_linear),
        Matrices("mixers", "small", 2 * value_heads, hidden, num_linear),
        Matrices("mixers", "conv", conv, taps, num_linear),
        _vector("mixers", value_heads, 2 * num_linear),
        _vector("norms", keys.need("linear_value_head_dim"), num_linear),
        Matrices("mixers", "mixer_out", hidden, values_dim, num_linear),
        *_qwen_attention(keys, num_full),
        _vector("norms", hidden, 2 * num_layers),
        *(_gated("dense", "dense", hidden, keys.need("intermediate_size"), num_dense) if num_dense else []),
        *_qwen_moe(keys, len(moe)),
    ]
    if num_mtp:
        fused = Matrices("mixers", "fused", hidden, 2 * hidden, 1)
        norms = _vector("norms", hidden, 5)
        matrices += _of_mtp([fused, norms, *_qwen_attention(keys, 1), *_qwen_moe(keys, 1)])
    layers = (*moe, *range(num_layers, num_layers + num_mtp))
    experts = ExpertSizes(layers, num_mtp, num_experts, top_k, hidden, keys.need("moe_intermediate_size"), 3)
    kv = 2 * _kv_heads(keys) * keys.need("head_dim")
    state = values_dim * keys.need("linear_key_head_dim")
    replay = conv + values_dim + 2 * value_heads
    return (
        matrices,
        experts,
        StateSizes(
            kv * num_full, kv * num_mtp, num_linear * state, num_linear * (taps - 1) * conv, num_linear * replay
        ),
    )


def _qwen_kinds(keys: ConfigKeys, num_layers: int) -> list[str]:
    """Return each layer's kind, linear_attention or full_attention, from the list or the interval in the config."""
    kinds = keys.items("layer_types", str)
    if not kinds:
        interval = keys.whole("full_attention_interval", 4) or 4
        return ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(num_layers)]
    allowed = ("linear_attention", "full_attention")
    if len(kinds) != num_layers or any(kind not in allowed for kind in kinds):
        raise ValueError(f"config.json must list {num_layers} layer_types, each {allowed[0]} or {allowed[1]}")
    return kinds


def _qwen_attention(keys: ConfigKeys, num: int) -> list[Matrices]:
    """Return the matrices of `num` attention layers, whose query projection also gives a gate of the same size."""
    hidden, head_dim = keys.need("hidden_size"), keys.need("head_dim")
    queries, kv = keys.need("num_attention_heads") * head_dim, _kv_heads(keys) * head_dim
    return [
        Matrices("mixers", "attention", 2 * queries, hidden, num),
        Matrices("mixers", "attention", kv, hidden, 2 * num),
        Matrices("mixers", "attention_out", hidden, queries, num),
        _vector("norms", head_dim, 2 * num),
    ]


def _qwen_moe(keys: ConfigKeys, num: int) -> list[Matrices]:
    hidden, num_experts, width = (keys.need(key) for key in ("hidden_size", "num_experts", "moe_intermediate_size"))
    return [
        Matrices("routers", "router", num_experts, hidden, num),
        *_gated("shared", "shared", hidden, keys.need("shared_expert_intermediate_size"), num),
        Matrices("shared", "small", 1, hidden, num),
        *_gated("routed", "routed", hidden, width, num * num_experts),
    ]


FAMILIES: dict[str, Callable[[ConfigKeys], Family]] = {
    "nemotron_h": _nemotron,
    "deepseek_v3": _deepseek,
    "qwen3_next": _qwen,
}
