"""The tests compare model sizes with lists of tensors, published totals, and the checkpoint of the demo model."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from typing import Any

import pytest
from safetensors import safe_open

from cluster.sizing.known_models import known_config, known_models
from cluster.sizing.model_sizes import model_sizes
from cluster.sizing.weight_formats import DTYPES, Dtype, dtype_of, with_hf_quantization
from model.configs.matrix_group import role_of
from model.demo import DEMO
from tests.cluster.sizing import tensors

Config = dict[str, Any]
TINY: Config = {**json.loads((DEMO / "config.json").read_text())}


@pytest.mark.parametrize("name", tensors.CHECKPOINTS)
def test_bytes_are_the_sum_of_the_tensors(name: str) -> None:
    model, dtype, listed, nbytes = tensors.CHECKPOINTS[name]
    stored = model_sizes(known_config(model)).stored(dtype)
    assert sum(stored.values()) == sum(nbytes(tensor, shape) for tensor, shape in listed())


@pytest.mark.parametrize("name", [name for name in tensors.CHECKPOINTS if name.endswith("bf16")])
def test_matrices_are_the_tensors(name: str) -> None:
    model, _, listed, _ = tensors.CHECKPOINTS[name]
    config = model_sizes(known_config(model)).config
    found = Counter((*role_of(tensor, config.num_layers), shape[0], prod(shape[1:])) for tensor, shape in listed())
    assert {(one.role, one.is_mtp, one.rows, one.columns): one.count for one in config.matrices} == found


def test_parts_are_the_sums_of_their_tensors() -> None:
    listed = list(tensors.nemotron_super())
    params = model_sizes(known_config("super")).params

    def total(*words: str, start: str = "backbone.") -> int:
        return sum(prod(shape) for name, shape in listed if name.startswith(start) and any(w in name for w in words))

    assert len([name for name, _ in listed if name.startswith("mtp.")]) == 1040
    assert len(listed) == 41_643 + 1040
    assert params["routed"] == total(".experts.")
    assert params["shared"] == total(".shared_experts.")
    assert params["latent"] == total("latent_proj")
    assert params["routers"] == total(".gate.")
    assert params["embedding"] == params["head"] == total("embeddings")
    assert params["mtp routed"] == total(".experts.", start="mtp.")
    assert params["mtp backbone"] == total("", start="mtp.") - params["mtp routed"]


def test_the_demos_bytes_are_those_of_its_file() -> None:
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    sizes = model_sizes(TINY)
    nbytes = sum(tensor.nbytes for tensor in found.values())
    assert sum(sizes.params.values()) == sum(tensor.numel() for tensor in found.values())
    assert sum(sizes.stored("bf16").values()) == pytest.approx(nbytes, rel=0.01)
    experts = sum(tensor.nbytes for name, tensor in found.items() if ".experts." in name)
    assert sum(spec.num_experts * spec.expert_bytes for spec in sizes.layer_specs("bf16")) == experts


@pytest.mark.parametrize(
    ("name", "main", "with_mtp"),
    [
        ("super", 120.67, 123.6),
        ("nano", 31.58, 31.58),
        ("ultra", 549.3, 560.5),
        ("deepseek-v3", 671.03, 671.03 + 11.61 + 2 * 0.927),
        ("qwen3-coder-next", 79.67, 79.67),
    ],
)
def test_totals_are_those_that_are_published(name: str, main: float, with_mtp: float) -> None:
    sizes = model_sizes(known_config(name))
    assert sizes.num_params / 1e9 == pytest.approx(main, rel=2e-4)
    assert sum(sizes.params.values()) / 1e9 == pytest.approx(with_mtp, rel=2e-4)
    assert sizes.has_mtp == (with_mtp > main)


def test_ultra_in_nvfp4_has_the_published_bits_of_a_weight() -> None:
    sizes = model_sizes(known_config("ultra"))
    assert 8 * sum(sizes.stored("nvfp4").values()) / sum(sizes.params.values()) == pytest.approx(5.03, rel=0.01)


def test_deltanet_layers_replay_neither_the_gate_nor_the_output() -> None:
    assert model_sizes(known_config("qwen3-coder-next")).state.replay == 36 * (8192 + 2 * 32)
    assert model_sizes(known_config("deepseek-v3")).state.replay == 0


def test_a_uniform_algorithm_of_model_optimizer_is_the_format_of_all() -> None:
    """Check Nano's way: one algorithm for all modules, and whole names of modules that stay bf16."""
    quantization = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "mtp*"]}}
    raw = {key: value for key, value in known_config("nano").items() if key != "quantized_matrices"}
    config = with_hf_quantization(raw, quantization)
    assert dtype_of(config) == "nvfp4"
    assert dtype_of(raw) == "bf16"
    before_attention = [4, 11, 18, 25, 32, 41]
    kept = [f"backbone.layers.{i}.mixer.{name}" for i in before_attention for name in ("in_proj", "out_proj")]
    with_kept = with_hf_quantization(raw, {"quantization": {"quant_algo": "nvfp4", "exclude_modules": kept}})
    expected = model_sizes(known_config("nano"))
    assert model_sizes(with_kept).stored("nvfp4") == expected.stored("nvfp4")
    more = sum(expected.stored("nvfp4").values()) - sum(model_sizes(config).stored("nvfp4").values())
    assert more == pytest.approx(6 * (10304 + 4096) * 2688 * (2 - 0.5625), rel=1e-6)


def test_quantization_in_the_config_comes_first() -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert with_hf_quantization(config, {"quantization": {"quant_algo": "NVFP4"}}) == config
    assert with_hf_quantization(config, {}) == config
    with pytest.raises(ValueError, match=r"^hf_quant_config\.json has quantization = 3; allowed is an object$"):
        with_hf_quantization(config, {"quantization": 3})


def test_a_qwen_with_a_module_for_drafts_has_its_tensors() -> None:
    sizes = model_sizes({**known_config("qwen3-coder-next"), "num_nextn_predict_layers": 1})
    listed = sum(prod(shape) for _, shape in tensors.qwen3_coder_next(has_mtp=True))
    assert sum(sizes.params.values()) == listed
    assert listed / 1e9 == pytest.approx(81.32, rel=2e-4)
    assert sizes.state.mtp_kv_bytes == 2048


@pytest.mark.parametrize(
    ("name", "params", "bf16", "fp8", "nvfp4"),
    [
        ("super", 5_505_024, 11_010_048, 5_505_024, 3_096_576),
        ("nano", 9_977_856, 19_955_712, 9_977_856, 5_612_544),
        ("ultra", 20_971_520, 41_943_040, 20_971_520, 11_796_480),
        ("deepseek-v3", 44_040_192, 88_080_384, 44_040_192 + 10_752, 24_772_608),
        ("qwen3-coder-next", 3_145_728, 6_291_456, 3_145_728 + 768, 1_769_472),
    ],
)
def test_an_expert_has_its_bytes_and_few_of_scales(name: str, params: int, bf16: int, fp8: int, nvfp4: int) -> None:
    sizes = model_sizes(known_config(name))
    assert sizes.experts.num_params == params
    for dtype, expected in zip(DTYPES, (bf16, fp8, nvfp4), strict=True):
        spec = sizes.layer_specs(dtype)[0]
        assert 0 <= spec.expert_bytes - expected <= 24
        assert spec.on_device("cuda") == bf16
        assert spec.expert_bytes <= spec.in_host_memory("cuda") <= 1.03 * spec.expert_bytes
        assert (spec.num_experts, spec.top_k) == (sizes.experts.num_experts, sizes.experts.top_k)


@pytest.mark.parametrize(
    ("name", "kv", "mtp_kv", "per_sequence"),
    [
        ("super", 8192, 1024, 170_229_760),
        ("nano", 6144, 0, 49_082_368),
        ("ultra", 12_288, 1024, 407_961_600),
        ("deepseek-v3", 70_272, 1152, 0),
        ("qwen3-coder-next", 24_576, 0, 77_266_944),
    ],
)
def test_state_is_what_the_layers_keep(name: str, kv: int, mtp_kv: int, per_sequence: int) -> None:
    state = model_sizes(known_config(name)).state
    assert (state.kv_bytes, state.mtp_kv_bytes, state.sequence_bytes) == (kv, mtp_kv, per_sequence)


def expert_layers(name: str) -> tuple[int, ...]:
    return tuple(shape.layer for shape in model_sizes(known_config(name)).config.expert_shapes)


def test_layers_of_experts_are_numbered_as_in_the_model() -> None:
    layers = expert_layers("super")
    assert layers[:4] == (1, 3, 5, 8)
    assert len(layers) == 41
    assert layers[-1] == 88 + 1  # The second layer of the MTP module comes last.
    assert expert_layers("deepseek-v3") == tuple(range(3, 62))


def test_the_mtp_modules_experts_are_quantized_where_public_checkpoints_have_it() -> None:
    deepseek = model_sizes(known_config("deepseek-v3"))
    assert deepseek.layer_specs("fp8")[-1].expert_bytes == deepseek.layer_specs("fp8")[0].expert_bytes
    assert deepseek.layer_specs("nvfp4")[-1].expert_bytes == 88_080_384
    specs = model_sizes(known_config("super")).layer_specs("nvfp4")
    assert specs[-1].expert_bytes == 11_010_048 > 3 * specs[0].expert_bytes


@pytest.mark.parametrize("name", known_models())
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backbone_and_the_experts_are_the_bf16_checkpoint(name: str, dtype: Dtype) -> None:
    """Check that backbone and experts together take the bytes of the checkpoint in bf16, with two exceptions.

    Routers are widened to fp32 on the device, and copies stay on disk.
    """
    sizes = model_sizes(known_config(name))
    stored = sizes.stored("bf16")
    experts = sum(spec.num_experts * spec.on_device("cuda") for spec in sizes.layer_specs(dtype))
    loaded = sizes.backbone_bytes + experts - (sum(stored.values()) - stored.get("mtp copies", 0))
    assert 0 < loaded <= 2.2 * stored["routers"]


def test_three_dialects_of_nemotrons_layers_are_one() -> None:
    letters = {"M": ("mamba", "linear_attention"), "E": ("moe", "moe"), "*": ("attention", "full_attention")}
    plain = {key: value for key, value in TINY.items() if "hybrid_override_pattern" not in key}
    for dialect in (0, 1):
        lists = {
            "layers_block_type": [letters[letter][dialect] for letter in TINY["hybrid_override_pattern"]],
            "mtp_layers_block_type": [letters[letter][dialect] for letter in "*E"],
        }
        assert model_sizes({**plain, **lists}) == model_sizes(TINY)


def test_dense_layers_and_shared_embeddings_are_counted() -> None:
    with_dense = model_sizes(
        {**TINY, "hybrid_override_pattern": "ME-*E", "num_hidden_layers": None, "intermediate_size": 384}
    )
    assert with_dense.params["dense"] == 2 * 384 * 256
    tied = model_sizes({**TINY, "tie_word_embeddings": True})
    assert "head" not in tied.params
    assert tied.step_params == model_sizes(TINY).step_params
    qwen = {**known_config("qwen3-coder-next"), "mlp_only_layers": [0], "intermediate_size": 5120}
    assert model_sizes(qwen).params["dense"] == 3 * 5120 * 2048
    assert model_sizes(qwen).experts.layer == 1


def test_the_list_of_a_quantized_checkpoint_is_counted() -> None:
    """Check the sizes from Model Optimizer's list of quantized modules, in which the first Mamba layer stays bf16."""
    layers: dict[str, Any] = {}
    for i, letter in enumerate(TINY["hybrid_override_pattern"]):
        stem = f"backbone.layers.{i}.mixer"
        if letter == "M" and i:
            layers[f"{stem}.in_proj"] = layers[f"{stem}.out_proj"] = {"quant_algo": "FP8"}
        if letter == "E":
            for part in ("up_proj", "down_proj"):
                layers[f"{stem}.shared_experts.{part}"] = {"quant_algo": "FP8"}
                layers |= {f"{stem}.experts.{k}.{part}": {"quant_algo": "NVFP4", "group_size": 16} for k in range(32)}
    config = {
        **TINY,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": layers,
        },
    }
    assert dtype_of(config) == "nvfp4"
    listed, plain = model_sizes(config), model_sizes(TINY)
    in_proj, out_proj = (8 * 64 + (8 * 64 + 2 * 2 * 64) + 8) * 256, 256 * 8 * 64
    more = sum(listed.stored("nvfp4").values()) - sum(plain.stored("nvfp4").values())
    assert more == in_proj + out_proj - 8  # bf16 takes one byte per weight more than FP8, but has no scales.
    assert listed.stored("bf16") == plain.stored("bf16")


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("super", ("lm_head", "mtp.layers.1.mixer.shared_experts.up_proj", "backbone.layers.7.mixer.o_proj")),
        ("deepseek-v3", ("model.layers.0.mlp.gate_proj", "model.layers.61.self_attn.o_proj")),
        (
            "qwen3-coder-next",
            ("lm_head", "model.layers.0.linear_attn.out_proj", "model.layers.9.mlp.experts.5.gate_proj"),
        ),
    ],
)
def test_the_modules_of_all_families_are_counted(name: str, modules: tuple[str, ...]) -> None:
    """Check that each listed module saves the bytes of one matrix in NVFP4, whatever the name of its role is."""
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "quantized_layers": {module: {"quant_algo": "w4a16_nvfp4"} for module in modules},
    }
    plain = {key: value for key, value in known_config(name).items() if not key.startswith("quantiz")}
    sizes = model_sizes({**plain, "quantization_config": quantization})
    roles = [role_of(module, sizes.config.num_layers) for module in modules]
    numbers = [one.rows * one.columns for one in sizes.matrices if (one.role, one.is_mtp) in roles]
    assert len(numbers) == len(modules)
    saved = sum(sizes.stored("bf16").values()) - sum(sizes.stored("nvfp4").values())
    assert saved == sum(num * 23 // 16 - 4 for num in numbers)  # 2 bytes a number become 9/16, and a scale is added.


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "mixed_precision"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, "bf16"),
    ],
)
def test_the_dtype_is_the_checkpoints(quantization: Any, expected: str) -> None:
    assert dtype_of({"quantization_config": quantization}) == expected


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"model_type": "llama"},
            "config.json has model_type = 'llama'; supported are nemotron_h, deepseek_v3, qwen3_next",
        ),
        ({"hidden_size": None}, "config.json lacks the key hidden_size"),
        ({"hidden_size": -4}, "config.json has hidden_size = -4; allowed is a positive integer"),
        ({"hidden_size": True}, "config.json has hidden_size = True; allowed is a positive integer"),
        ({"vocab_size": "2048"}, "config.json has vocab_size = '2048'; allowed is a positive integer"),
        ({"moe_latent_size": 1.5}, "config.json has moe_latent_size = 1.5; allowed is a positive integer"),
        ({"hybrid_override_pattern": "MEX"}, "hybrid_override_pattern has the layer 'X'; allowed are M, E, * and -"),
        ({"hybrid_override_pattern": ""}, "config.json lacks the key hybrid_override_pattern (or layers_block_type)"),
        ({"num_hidden_layers": 9}, "config.json has num_hidden_layers = 9, but a pattern of 14 layers"),
        ({"num_nextn_predict_layers": 2}, "config.json has num_nextn_predict_layers = 2; supported are 0 and 1"),
        (
            {"num_experts_per_tok": 33},
            "config.json has num_experts_per_tok = 33; allowed is 1 to n_routed_experts = 32",
        ),
        ({"n_shared_experts": 2}, "config.json has n_shared_experts = 2; supported is 1"),
        ({"n_groups": 3}, "config.json has mamba_num_heads = 8, which n_groups = 3 does not divide"),
        (
            {"hybrid_override_pattern": "", "layers_block_type": ["mamba", "conv"]},
            "layers_block_type has the layer 'conv'; allowed are mamba, linear_attention, moe, attention, ",
        ),
        (
            {"hybrid_override_pattern": "M*", "num_hidden_layers": 2, "num_nextn_predict_layers": 0},
            "config.json describes no layer with routed experts, so there is nothing to put on shards",
        ),
    ],
)
def test_a_mistake_in_a_config_is_one_sentence(changed: Config, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        model_sizes({**TINY, **changed})
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changed", "sentence"),
    [
        (
            "deepseek-v3",
            {"first_k_dense_replace": 61},
            "config.json has first_k_dense_replace = 61, but only 61 layers",
        ),
        ("deepseek-v3", {"moe_layer_freq": 2}, "config.json has moe_layer_freq = 2; supported is 1"),
        ("deepseek-v3", {"kv_lora_rank": None}, "config.json lacks the key kv_lora_rank"),
        (
            "qwen3-coder-next",
            {"layer_types": ["mamba"]},
            "config.json has layer_types = ['mamba']; allowed is a list",
        ),
        ("qwen3-coder-next", {"linear_conv_kernel_dim": 0}, "config.json has linear_conv_kernel_dim = 0; allowed is a"),
    ],
)
def test_a_mistake_in_another_family_is_one_sentence(name: str, changed: Config, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        model_sizes({**known_config(name), **changed})
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("quantization", "sentence"),
    [
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "config.json has quantization_config.quant_method = 'compressed-tensors'; supported are fp8 and modelopt",
        ),
        (
            {"quant_method": "awq"},
            "config.json has quantization_config.quant_method = 'awq'; supported are fp8 and modelopt",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            "config.json has quantization_config.weight_block_size = [64, 64]; supported are ",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "INT4"},
            "config.json has quantization_config.quant_algo = 'INT4'; supported are FP8, NVFP4, W4A16_NVFP4",
        ),
    ],
)
def test_a_quantization_that_is_not_sized_is_one_sentence(quantization: Config, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        dtype_of({**TINY, "quantization_config": quantization})
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({"a.b": {"quant_algo": "FP8"}}, "config.json lists a.b as quantized, but describes no such matrix"),
        (
            {"backbone.layers.0.mixer.in_proj": {"quant_algo": "INT4_AWQ"}},
            "config.json lists backbone.layers.0.mixer.in_proj with quant_algo = 'INT4_AWQ'; supported are FP8, NVFP4, "
            "W4A16_NVFP4",
        ),
        (
            {"mtp.layers.0.mixer.in_proj": {"quant_algo": "FP8"}},
            "config.json lists mixer.in_proj in the MTP module as quantized, but describes no such matrix",
        ),
    ],
)
def test_an_unknown_quantized_module_is_one_sentence(layers: Config, sentence: str) -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "quantized_layers": layers}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        model_sizes({**TINY, "quantization_config": quantization})
    assert str(caught.value) == sentence


def test_a_name_is_one_model_or_a_sentence_with_all() -> None:
    assert known_config("NEMOTRON-3-super")["hidden_size"] == 4096
    with pytest.raises(ValueError, match=r"could be NVIDIA-Nemotron-3-Nano.* or NVIDIA-Nemotron-3-Super.* or "):
        known_config("nemotron")
    with pytest.raises(ValueError, match=r"none of DeepSeek-V3, .*, Qwen3-Coder-Next$"):
        known_config("gpt")


def error_message(config: Config) -> str:
    """Return the message of the error that `config` raises; empty if the config can be sized."""
    try:
        sizes, _ = model_sizes(config), dtype_of(config)
        return "" if all(sum(sizes.stored(dtype).values()) > 0 for dtype in DTYPES) else "It has no bytes.\n"
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["demo", *known_models()])
def test_whatever_a_key_holds_it_is_a_size_or_a_sentence(name: str) -> None:
    config = TINY if name == "demo" else known_config(name)
    keys = {
        *config,
        "layers_block_type",
        "layer_types",
        "mlp_only_layers",
        "quantization_config",
        "decoder_sparse_step",
    }
    wrong: tuple[Any, ...] = (None, 0, -1, 1.5, True, "x", [], ["x"], [0], {}, {"quantized_layers": 1}, {"nvfp4": 1})
    messages = {(key, str(value)): error_message({**config, key: value}) for key in keys for value in wrong}
    assert all("\n" not in sentence for sentence in messages.values())
    assert {"model_type", "hidden_size", "max_position_embeddings"} <= {
        key for (key, _), message in messages.items() if message
    }
