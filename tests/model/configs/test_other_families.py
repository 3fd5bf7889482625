"""The tests read the configs of DeepSeek-V3 and Qwen3-Next in both public dialects, and with every kind of mistake."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cluster.sizing.known_models import known_config
from model.configs.deepseek_v3 import DeepseekV3Config
from model.configs.model_config import ModelConfig
from model.configs.qwen3_next import Qwen3NextConfig
from model.configs.registry import parse_config
from model.configs.rope_shape import RopeShape, YarnScaling
from model.configs.state_spec import PagedSpec

DEEPSEEK, QWEN = known_config("deepseek-v3"), known_config("qwen3-coder-next")
YARN = YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)


def deepseek(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config.from_json({**DEEPSEEK, **changes})


def qwen(**changes: Any) -> Qwen3NextConfig:
    return Qwen3NextConfig.from_json({**QWEN, **changes})


def test_flat_and_nested_keys_of_rope_say_the_same() -> None:
    flat = deepseek()
    assert flat.rope == RopeShape(64, 10_000.0, is_interleaved=True, yarn=YARN)
    scaling = {key: value for key, value in DEEPSEEK["rope_scaling"].items() if key != "type"}
    nested = {"rope_type": "yarn", "rope_theta": 10_000, **scaling}
    assert deepseek(rope_scaling=None, rope_theta=None, rope_parameters=nested) == flat
    assert qwen().rope == RopeShape(64, 5_000_000.0, is_interleaved=False)
    nested = {"rope_type": "default", "rope_theta": 5_000_000, "partial_rotary_factor": 0.25}
    assert qwen(rope_theta=None, partial_rotary_factor=None, rope_parameters=nested) == qwen()
    assert qwen(rope_scaling=None) == qwen(partial_rotary_factor=None) == qwen()


def test_missing_keys_have_the_defaults_of_transformers() -> None:
    missing = {"norm_topk_prob": None, "tie_word_embeddings": None}
    for config in (deepseek(**missing), qwen(**missing)):
        assert config.norm_topk_prob
        assert not config.tie_word_embeddings


def test_yarn_without_a_factor_stretches_to_the_context() -> None:
    scaling = {**DEEPSEEK["rope_scaling"], "factor": None}
    assert deepseek(rope_scaling=scaling) == deepseek()
    assert deepseek(max_position_embeddings=8192, rope_scaling=scaling).rope.yarn == YarnScaling(
        2.0, 4096, 32.0, 1.0, 1.0, 1.0
    )


def test_yarn_scales_as_transformers_does() -> None:
    """Check the two factors of YaRN: of the cosines and sines, and of the scores before the softmax."""
    magnitude = 1.3688879454113936  # 0.1 · ln 40 + 1
    assert YARN.rotation_factor == 1.0
    assert deepseek().softmax_scale == pytest.approx(192**-0.5 * magnitude**2)
    scaling = {**DEEPSEEK["rope_scaling"], "mscale_all_dim": None}
    only_one = deepseek(rope_scaling=scaling)
    assert only_one.rope.yarn is not None
    assert only_one.rope.yarn.rotation_factor == pytest.approx(magnitude)
    assert only_one.softmax_scale == pytest.approx(192**-0.5)
    assert deepseek(rope_scaling=None).softmax_scale == pytest.approx(192**-0.5)


def test_deepseeks_layers_are_dense_then_experts_then_the_mtp_module() -> None:
    config = deepseek()
    assert [shape.layer for shape in config.expert_shapes] == [*range(3, 62)]
    assert {(shape.kind, shape.num_params) for shape in config.expert_shapes} == {("swiglu", 44_040_192)}
    assert config.state_spec.paged[0] == PagedSpec(0, (576,))
    assert (len(config.state_spec.paged), config.state_spec.recurrent) == (62, ())
    assert (config.replay_width, config.chunk_align, config.num_layers) == (0, 1, 61)
    moonlight = deepseek(q_lora_rank=None, num_nextn_predict_layers=None)
    assert moonlight.mla.query_rank is None
    assert moonlight.expert_shapes[-1].layer == 60


def test_expert_shapes_tell_the_routers_groups() -> None:
    assert {(shape.num_groups, shape.top_groups) for shape in deepseek().expert_shapes} == {(8, 4)}
    assert {(shape.num_groups, shape.top_groups) for shape in qwen().expert_shapes} == {(1, 1)}


def test_qwens_layers_follow_from_a_list_or_an_interval() -> None:
    config = qwen()
    types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 12
    assert qwen(layer_types=types, full_attention_interval=None) == qwen(full_attention_interval=None) == config
    assert [spec.layer for spec in config.state_spec.paged] == [*range(3, 48, 4)]
    shapes = config.state_spec.recurrent[0].shapes
    assert shapes == ((3, 8192), (32, 128, 128))
    assert config.replay_width == 36 * (8192 + 64)
    assert [shape.layer for shape in config.expert_shapes] == [*range(48)]
    odd = qwen(decoder_sparse_step=2, mlp_only_layers=[3], intermediate_size=5120, num_nextn_predict_layers=1)
    assert [shape.layer for shape in odd.expert_shapes] == [1, *range(5, 48, 2), 48]
    assert odd.state_spec.paged[-1].layer == 48


@pytest.mark.parametrize("raw", [DEEPSEEK, QWEN, known_config("super")], ids=lambda raw: raw["model_type"])
def test_the_registry_finds_the_class(raw: dict[str, Any]) -> None:
    config: ModelConfig = parse_config(raw)
    assert type(config).__name__.lower().startswith(raw["model_type"].replace("_", ""))
    assert (config.vocab_size, config.hidden_size) == (raw["vocab_size"], raw["hidden_size"])
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("raw", "changes", "sentence"),
    [
        (DEEPSEEK, {"topk_method": "greedy"}, "config.json has topk_method = 'greedy'; supported is 'noaux_tc'"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "config.json has scoring_func = 'softmax'; supported is 'sigmoid'"),
        (DEEPSEEK, {"attention_bias": True}, "config.json has attention_bias = True; supported is False"),
        (
            DEEPSEEK,
            {"num_key_value_heads": 8},
            "config.json has num_key_value_heads = 8; supported is num_attention_heads",
        ),
        (
            DEEPSEEK,
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "config.json has rope_scaling.type = 'linear'; supported are default and yarn",
        ),
        (
            DEEPSEEK,
            {"rope_scaling": {"type": "yarn", "factor": "x"}},
            "config.json has rope_scaling.factor = 'x'; allowed is a number from 0 up",
        ),
        (
            DEEPSEEK,
            {"rope_scaling": {"type": "yarn", "factor": 0}},
            "config.json has rope_scaling.factor = 0; allowed is a number above 0",
        ),
        (
            DEEPSEEK,
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000}},
            "config.json has rope_parameters.rope_type = 'llama3'; supported are default and yarn",
        ),
        (DEEPSEEK, {"moe_layer_freq": 2}, "config.json has moe_layer_freq = 2; supported is 1"),
        (DEEPSEEK, {"hidden_act": "gelu"}, "config.json has hidden_act = 'gelu'; supported is 'silu'"),
        (DEEPSEEK, {"rope_interleave": 1}, "config.json has rope_interleave = 1; allowed are true and false"),
        (DEEPSEEK, {"q_lora_rank": -1}, "config.json has q_lora_rank = -1; allowed is an integer from 0 up"),
        (DEEPSEEK, {"rope_scaling": 3}, "config.json has rope_scaling = 3; allowed is an object"),
        (
            DEEPSEEK,
            {"qk_rope_head_dim": 63},
            "config.json asks for RoPE with theta = 10000 for 63 of the 63 numbers of a head; allowed are "
            "theta > 1 and an even part of a head",
        ),
        (DEEPSEEK, {"n_group": 7}, "config.json has n_routed_experts = 256, which n_group = 7 does not divide"),
        (DEEPSEEK, {"topk_group": 9}, "config.json has topk_group = 9; allowed is 1 to n_group = 8"),
        (DEEPSEEK, {"routed_scaling_factor": None}, "config.json lacks the key routed_scaling_factor"),
        (DEEPSEEK, {"norm_topk_prob": "yes"}, "config.json has norm_topk_prob = 'yes'; allowed are true and false"),
        (QWEN, {"hidden_act": "gelu"}, "config.json has hidden_act = 'gelu'; supported is 'silu'"),
        (QWEN, {"scoring_func": "sigmoid"}, "config.json has scoring_func = 'sigmoid'; supported is 'softmax'"),
        (QWEN, {"attn_output_gate": False}, "config.json has attn_output_gate = False; supported is True"),
        (QWEN, {"use_sliding_window": True}, "config.json has use_sliding_window = True; supported is False or None"),
        (QWEN, {"attention_bias": True}, "config.json has attention_bias = True; supported is False"),
        (
            QWEN,
            {"rope_scaling": {"rope_type": "longrope", "factor": 4}},
            "config.json has rope_scaling.rope_type = 'longrope'; supported are default and yarn",
        ),
        (
            QWEN,
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
            "config.json has rope_parameters.rope_type = 'linear'; supported are default and yarn",
        ),
        (
            QWEN,
            {"num_hidden_layers": 2, "layer_types": ["linear_attention", "sliding"]},
            "config.json has layer_types = ['linear_attention', 'sliding']; allowed is a list of 2 names, each "
            "linear_attention or full_attention",
        ),
        (
            QWEN,
            {"layer_types": "full_attention"},
            "config.json has layer_types = 'full_attention'; allowed is a list of",
        ),
        (
            QWEN,
            {"decoder_sparse_step": 0},
            "config.json has decoder_sparse_step = 0; allowed is a positive integer",
        ),
        (QWEN, {"mlp_only_layers": ["3"]}, "config.json has mlp_only_layers = ['3']; allowed is a list of integers"),
        (
            QWEN,
            {"partial_rotary_factor": 0.254},
            "config.json asks for RoPE with theta = 5e+06 for 65 of the 256 numbers of a head",
        ),
        (
            QWEN,
            {"num_experts_per_tok": 513},
            "config.json has num_experts_per_tok = 513; allowed is 1 to num_experts = 512",
        ),
        (
            QWEN,
            {"linear_num_key_heads": 5},
            "config.json has linear_num_value_heads = 32, which linear_num_key_heads = 5 does not divide",
        ),
        (QWEN, {"num_nextn_predict_layers": 2}, "config.json has num_nextn_predict_layers = 2; supported are 0 and 1"),
        (
            QWEN,
            {"model_type": "llama"},
            "config.json has model_type = 'llama'; supported are nemotron_h, deepseek_v3, ",
        ),
    ],
)
def test_a_mistake_is_one_sentence(raw: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        parse_config({**raw, **changes})
