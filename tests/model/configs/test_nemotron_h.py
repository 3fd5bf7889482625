"""The tests read every public dialect of config.json and check the error message for every kind of wrong config."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from model.blocks.expert_bank import LocalExperts
from model.checkpoint import Checkpoint
from model.configs.matrix_group import role_of
from model.configs.model_files import read_json
from model.configs.nemotron_h import NemotronHConfig
from model.families.nemotron_h import NemotronH, make_moe
from model.families.registry import load_family
from tests.model.checkpoints import BASE, VARIANTS, WITH_MTP, Tiny, edit_config

PATTERN = "MEM*E-"
OLD_LIST = ["mamba", "moe", "mamba", "attention", "moe", "mlp"]
NEW_LIST = ["linear_attention", "moe", "linear_attention", "full_attention", "moe", "mlp"]


def parse(*without: str, **changes: object) -> NemotronHConfig:
    raw = {key: value for key, value in (BASE | changes).items() if key not in without}
    return NemotronHConfig.from_json(raw)


def refused(sentence: str, *without: str, **changes: object) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse(*without, **changes)


def test_pattern_string_and_both_lists_say_the_same() -> None:
    expected = parse(hybrid_override_pattern=PATTERN)
    assert expected.pattern == PATTERN
    for names in (OLD_LIST, NEW_LIST):
        assert parse("hybrid_override_pattern", layers_block_type=names) == expected


@pytest.mark.parametrize(
    "dialect",
    [
        {"mtp_hybrid_override_pattern": "*-E"},
        {"mtp_layers_block_type": ["attention", "mlp", "moe"]},
        {"mtp_layers_block_type": ["full_attention", "mlp", "moe"]},
    ],
    ids=str,
)
def test_mtp_pattern_string_and_both_lists_say_the_same(dialect: dict[str, Any]) -> None:
    config = parse(num_nextn_predict_layers=1, **dialect)
    assert config.mtp_pattern == "*-E"
    assert config.layers == BASE["hybrid_override_pattern"] + "*-E"
    assert [shape.layer for shape in config.expert_shapes] == [1, 4, 6, 9]


def test_mtp_layers_number_on_after_the_backbone() -> None:
    assert parse(num_nextn_predict_layers=1).layers == BASE["hybrid_override_pattern"] + "*E"
    assert parse().layers == BASE["hybrid_override_pattern"]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_transformers_writes_is_read(tiny_of: Callable[[str], Tiny], name: str) -> None:
    tiny = tiny_of(name)
    config = load_family(tiny.path).config
    assert config.pattern == tiny.raw["hybrid_override_pattern"]
    assert config.mamba.delta_limit == (0.0, float("inf"))
    assert "__float__" in (tiny.path / "config.json").read_text()
    if tiny.name == WITH_MTP:
        assert config.mtp_pattern == VARIANTS[WITH_MTP]["mtp_hybrid_override_pattern"]


def test_infinity_as_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, {"__float__": "Infinity"}], "a": {"b": 1}}')
    assert read_json(tmp_path / "config.json") == {"time_step_limit": [0.0, float("inf")], "a": {"b": 1}}


def test_older_names_of_the_mamba_sizes() -> None:
    older = {"mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_chunk_size": 8}
    assert parse("n_groups", "conv_kernel", "chunk_size", **older) == parse()


@pytest.mark.parametrize(
    ("in_config", "generation", "expected"),
    [
        (2, {"eos_token_id": [2, 11]}, (2, 11)),
        (2, {"eos_token_id": [11]}, (11, 2)),
        (2, {"eos_token_id": 0}, (0, 2)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {}, (2,)),
        ([3, 4], None, (3, 4)),
        (None, {}, ()),
        (0, None, (0,)),
    ],
    ids=str,
)
def test_eos_ids_are_those_of_both_configs(in_config: object, generation: Any, expected: tuple[int, ...]) -> None:
    assert NemotronHConfig.from_json(BASE | {"eos_token_id": in_config}, generation).eos_token_ids == expected


@pytest.mark.parametrize("eos", ["2", 2.0, True, [2, None], -1, {}], ids=str)
def test_eos_ids_that_are_no_ids_are_refused(eos: object) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json has eos_token_id = .*; allowed are a token id or a"):
        NemotronHConfig.from_json(BASE, {"eos_token_id": eos})
    with pytest.raises(ValueError, match=r"^config\.json has eos_token_id = .*; allowed are a token id or a list"):
        NemotronHConfig.from_json(BASE | {"eos_token_id": eos})


def test_eos_ids_of_a_directory(latent: Tiny, tmp_path: Path) -> None:
    path = edit_config(latent.path, tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    assert load_family(path).eos_token_ids == (2, 11)
    (path / "generation_config.json").unlink()
    assert load_family(path).eos_token_ids == (2,)
    tokens = [{"id": 7, "content": "<end>"}, {"id": 10**6, "content": "<far>"}]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": {"x": 9}}}))
    assert load_family(path).eos_token_ids == (2,)
    named: list[tuple[object, tuple[int, ...]]] = [
        ("<end>", (2, 7)),
        ({"content": "<end>"}, (2, 7)),
        ("x", (2, 9)),
        ("<far>", (2,)),
        ("none of them", (2,)),
        (None, (2,)),
    ]
    for name, expected in named:
        (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        assert load_family(path).eos_token_ids == expected, name
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert load_family(path).eos_token_ids == (2, 7)


def test_unknown_layers_are_named() -> None:
    refused("hybrid_override_pattern has the layer 'X'; allowed are M, E, * and -", hybrid_override_pattern="MEX")
    refused(
        "mtp_hybrid_override_pattern has the layer '?'; allowed are M, E, * and -",
        mtp_hybrid_override_pattern="*?",
        num_nextn_predict_layers=1,
    )
    refused(
        "layers_block_type has the layer 'conv'; "
        "allowed are mamba, linear_attention, moe, attention, full_attention, mlp",
        "hybrid_override_pattern",
        layers_block_type=["mamba", "conv"],
    )


@pytest.mark.parametrize(
    "key", [key for key in BASE if isinstance(BASE[key], int) and key.startswith(("h", "v", "ma"))]
)
def test_missing_keys_are_named(key: str) -> None:
    refused(f"config.json lacks the key {key}", key)


@pytest.mark.parametrize("key", ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "ssm_state_size"])
def test_missing_sizes_are_named(key: str) -> None:
    refused(f"config.json lacks the key {key}", key)


def test_keys_of_absent_layers_are_not_asked_for() -> None:
    config = parse("n_routed_experts", "moe_intermediate_size", "intermediate_size", hybrid_override_pattern="M*M")
    assert config.expert_shapes == ()


@pytest.mark.parametrize(("letter", "key"), [("E", "n_routed_experts"), ("-", "intermediate_size")])
def test_sizes_of_layers_that_only_the_mtp_module_has_are_needed(letter: str, key: str) -> None:
    of_mtp = {"hybrid_override_pattern": "M*M", "mtp_hybrid_override_pattern": f"*{letter}"}
    refused(f"config.json lacks the key {key}", key, num_nextn_predict_layers=1, **of_mtp)
    config = parse(num_nextn_predict_layers=1, **of_mtp)
    assert [shape.num_experts for shape in config.expert_shapes] == [BASE["n_routed_experts"]] * (letter == "E")
    assert config.intermediate_size == (BASE["intermediate_size"] if letter == "-" else 0)


def test_recurrent_layers_in_the_mtp_module_are_refused() -> None:
    sentence = "config.json has an MTP module with the layers M*; allowed are E, * and -"
    refused(sentence, mtp_hybrid_override_pattern="M*", num_nextn_predict_layers=1)
    assert parse(mtp_hybrid_override_pattern="M*", num_nextn_predict_layers=0).layers == BASE["hybrid_override_pattern"]


def test_missing_pattern_is_named() -> None:
    refused("config.json lacks the key hybrid_override_pattern (or layers_block_type)", "hybrid_override_pattern")


def test_another_number_of_layers_than_the_pattern_names_is_refused() -> None:
    num_layers = len(BASE["hybrid_override_pattern"])
    assert parse(num_hidden_layers=num_layers) == parse(num_hidden_layers=None) == parse()
    sentence = f"config.json has num_hidden_layers = {num_layers + 1}, but a pattern of {num_layers} layers"
    refused(sentence, num_hidden_layers=num_layers + 1)
    refused(sentence, "hybrid_override_pattern", num_hidden_layers=num_layers + 1, layers_block_type=["mamba"] * 7)


def test_no_latent_size_is_said_by_null_zero_or_nothing() -> None:
    plain = parse("moe_latent_size")
    assert plain == parse(moe_latent_size=None) == parse(moe_latent_size=0)
    assert {shape.input_dim for shape in plain.expert_shapes} == {BASE["hidden_size"]}
    assert not make_moe(plain, 1, LocalExperts({})).is_latent
    refused("config.json has moe_latent_size = -1; allowed is a positive integer", moe_latent_size=-1)


def test_sizes_that_do_not_divide_are_named() -> None:
    refused("config.json has mamba_num_heads = 8, which n_groups = 3 does not divide", n_groups=3)
    refused(
        "config.json has num_attention_heads = 4, which num_key_value_heads = 3 does not divide", num_key_value_heads=3
    )
    refused("config.json has n_routed_experts = 8, which n_group = 3 does not divide", n_group=3)


@pytest.mark.parametrize("value", ["64", 0, -1, 6.5], ids=str)
def test_sizes_are_positive_integers(value: object) -> None:
    refused(f"config.json has hidden_size = {value!r}; allowed is a positive integer", hidden_size=value)
    refused(f"config.json has mamba_num_heads = {value!r}; allowed is a positive integer", mamba_num_heads=value)


def test_numbers_out_of_range_are_named() -> None:
    refused("config.json has num_experts_per_tok = 9; allowed is 1 to n_routed_experts = 8", num_experts_per_tok=9)
    refused("config.json has topk_group = 3; allowed is 1 to n_group = 2", n_group=2, topk_group=3)
    sentence = "config.json has num_experts_per_tok = 3, but topk_group allows only 2 experts per token"
    refused(sentence, n_group=4, topk_group=1, num_experts_per_tok=3)


@pytest.mark.parametrize("limit", [[1.0, 0.0], [float("nan"), 1.0]], ids=str)
def test_a_limit_that_no_number_keeps_is_refused(limit: list[float]) -> None:
    sentence = "allowed are two numbers of which the second is not smaller"
    refused(f"config.json has time_step_limit = {limit}; {sentence}", time_step_limit=limit)


def test_what_is_not_supported_is_named() -> None:
    refused("config.json has mlp_hidden_act = 'silu'; supported is 'relu2'", mlp_hidden_act="silu")
    refused("config.json has residual_in_fp32 = True; supported is False", residual_in_fp32=True)
    refused("config.json has n_shared_experts = 2; supported is 1", n_shared_experts=2)
    refused("config.json has num_nextn_predict_layers = 2; supported are 0 and 1", num_nextn_predict_layers=2)


def test_an_unknown_family_is_named(latent: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has model_type 'llama'; supported are nemotron_h"):
        load_family(edit_config(latent.path, tmp_path, model_type="llama"))


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: (path / "config.json").write_text("{broken"), "config.json is not valid JSON: Expecting"),
        (lambda path: (path / "config.json").write_text("[1]"), "config.json must hold a JSON object, not a list"),
        (lambda path: None, "is not a model directory: it has no config.json"),
    ],
    ids=["broken", "list", "absent"],
)
def test_a_config_that_is_no_config(tmp_path: Path, write: Callable[[Path], object], sentence: str) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_family(tmp_path)


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the model path .*nowhere is not a directory"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_matrices_are_the_modules_parameters(variant: str) -> None:
    config = parse(**VARIANTS[variant])
    with torch.device("meta"):
        model = NemotronH(config, LocalExperts({}))
    found: Counter[tuple[str, bool, int, int]] = Counter()
    for name, tensor in model.state_dict().items():
        found[*role_of(name, config.num_layers), tensor.shape[0], prod(tensor.shape[1:])] += 1
    listed = {
        (one.role, one.is_mtp, one.rows, one.columns): one.count for one in config.matrices if one.part != "routed"
    }
    assert listed == found
    routed = sum(one.num_params for one in config.matrices if one.part == "routed")
    assert routed == sum(shape.num_experts * shape.num_params for shape in config.expert_shapes)
