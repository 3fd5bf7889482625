"""The tests compare Qwen3-Next with its equations, and serve every dialect of its checkpoints.

`test_every_family.py` compares it with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.families.checkpoint_family import BackboneModule
from model.families.qwen3_next import Qwen3Next
from model.families.registry import load_family
from tests.model import qwen_oracle
from tests.model.checkpoints import Tiny, edit, edit_config
from tests.model.conftest import load_fp32
from tests.model.qwen_checkpoints import DRAFTING, RE_SAVED, THETA, VARIANTS, rotated_share, write_qwen
from tests.model.steps import Steps, full_logits, random_tokens, relative_error, split_logits

BOUND = 1e-4  # the largest relative error that the project allows; measured errors are near 1e-6
LENGTH = 37


def tensors_of(tiny: Tiny) -> dict[str, Tensor]:
    return load_file(tiny.plain / "model.safetensors")


@pytest.fixture(params=VARIANTS)
def tiny(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of(request.param)


def test_logits_equal_the_equations(tiny: Tiny, model: BackboneModule) -> None:
    tokens = random_tokens(20)
    expected = qwen_oracle.logits(tensors_of(tiny), tiny.raw, tokens, THETA, rotated_share(tiny.name))
    assert relative_error(full_logits(model, tokens), expected) < BOUND


@pytest.mark.parametrize("name", ["qwen", "qwen_sparse"])
def test_every_cut_and_every_single_step_give_the_same_bits(model_of: Callable[..., BackboneModule], name: str) -> None:
    model, tokens = model_of(name), random_tokens(LENGTH)
    whole = full_logits(model, tokens)
    for cut in range(1, LENGTH):
        assert torch.equal(split_logits(model, tokens, [cut]), whole), cut
    assert torch.equal(split_logits(model, tokens, list(range(1, LENGTH))), whole)


def test_bfloat16_is_near_fp32(tiny_of: Callable[[str], Tiny], model_of: Callable[..., BackboneModule]) -> None:
    family, tokens = load_family(tiny_of("qwen").path), random_tokens(21)
    model = family.load_backbone(family.load_local_experts(torch.bfloat16), torch.bfloat16)
    weights = model.state_dict()
    assert weights["layers.0.attention.mixer.A_log"].dtype == torch.float32
    assert weights["layers.0.attention.mixer.dt_bias"].dtype == torch.float32
    assert weights["layers.0.mlp.mixer.gate.weight"].dtype == torch.float32
    assert weights["layers.0.attention.norm.weight"].dtype == torch.bfloat16
    exact = full_logits(model_of("qwen"), tokens)
    assert (full_logits(model, tokens) - exact).double().square().mean() < 0.02 * exact.double().square().mean()


def test_yarn_stretches_the_rotations(tmp_path: Path, tiny_of: Callable[[str], Tiny]) -> None:
    """Check the public way to reach a million tokens: YaRN's factor in the config."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    path = edit_config(tiny_of("qwen").path, tmp_path, rope_scaling=scaling)
    oracle: Any = type(tiny_of("qwen").oracle).from_pretrained(path, dtype=torch.float32)
    oracle.set_experts_implementation("eager")
    tokens = random_tokens(LENGTH)
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens])).logits[0]
    assert relative_error(full_logits(load_fp32(load_family(path)), tokens), expected) < BOUND
    assert relative_error(tiny_of("qwen").logits(tokens), expected) > 10 * BOUND


# MTP ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=DRAFTING)
def drafting(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of(request.param)


@pytest.fixture(params=["compiled", "plain"])
def drafting_model(
    request: pytest.FixtureRequest, drafting: Tiny, model_of: Callable[..., BackboneModule]
) -> BackboneModule:
    return model_of(drafting.name, request.param == "plain")


def expected_draft(tiny: Tiny, hidden: Tensor, next_ids: list[int]) -> Tensor:
    return qwen_oracle.draft(tensors_of(tiny), tiny.raw, hidden, next_ids, THETA, rotated_share(tiny.name))


def test_drafts_equal_the_equations(drafting: Tiny, drafting_model: BackboneModule) -> None:
    """Check the first drafts of all positions at once and one by one, and the second draft after the last position."""
    tokens, steps = random_tokens(18), Steps(drafting_model)
    hidden = steps.forward((0, tokens[:17], 0))[0]
    share = rotated_share(drafting.name)
    own = qwen_oracle.hidden(tensors_of(drafting), drafting.raw, tokens[:17], THETA, share)
    expected = expected_draft(drafting, own, tokens[1:])
    first = steps.draft(hidden, tokens[1:], 0)  # one position earlier than in serving: only distances count
    assert relative_error(first, expected) < BOUND
    singly = [steps.draft(hidden[t : t + 1], tokens[t + 1 : t + 2], t) for t in range(17)]
    assert relative_error(torch.cat(singly), expected) < BOUND
    drafted = int(drafting_model.logits(first[-1]).argmax())
    second = steps.draft(first[-1:], [drafted], 17)
    inputs = torch.cat([hidden, first[-1:]])
    assert relative_error(second[0], expected_draft(drafting, inputs, [*tokens[1:], drafted])[-1]) < BOUND


def test_drafting_leaves_the_backbone_as_it_is(model_of: Callable[..., BackboneModule]) -> None:
    model, tokens = model_of("qwen"), random_tokens(30)
    steps = Steps(model)
    hidden = steps.forward((0, tokens[:20], 0))[0]
    steps.draft(hidden, tokens[1:21], 0)
    assert torch.equal(steps.logits((0, tokens[20:], 20))[0], full_logits(model, tokens)[20:])


def test_the_tensors_tell_if_there_is_a_module_to_draft_with(tiny_of: Callable[[str], Tiny]) -> None:
    with_mtp, without = load_family(tiny_of("qwen").path), load_family(tiny_of(RE_SAVED).path)
    assert with_mtp.has_mtp
    assert not without.has_mtp
    assert [shape.layer for shape in with_mtp.expert_shapes] == [0, 1, 2, 3, 4, 5]
    assert [shape.layer for shape in without.expert_shapes] == [1]
    assert [spec.layer for spec in with_mtp.config.state_spec.paged] == [2, 5]
    model = load_fp32(without)
    assert isinstance(model, Qwen3Next)
    assert model.mtp is None


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_second_layer_of_the_mtp_module_is_refused(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    path = edit(
        tiny_of("qwen").path, tmp_path, lambda t: t.update({"mtp.layers.1.input_layernorm.weight": torch.ones(64)})
    )
    with pytest.raises(ValueError, match="num_nextn_predict_layers = 2; supported are 0 and 1"):
        _ = load_family(path).config


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.linear_attn.in_proj_ba.weight",
        "model.layers.2.self_attn.q_norm.weight",
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.layers.3.mlp.experts.5.gate_proj.weight",
        "mtp.fc.weight",
        "mtp.layers.0.mlp.experts.7.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(tiny_of: Callable[[str], Tiny], tmp_path: Path, name: str) -> None:
    family = load_family(edit(tiny_of("qwen").path, tmp_path, lambda tensors: tensors.pop(name)))
    with pytest.raises(ValueError, match=f"no tensor {re.escape(name)}"):
        family.check()


def test_an_unknown_tensor_is_named(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    path = edit(tiny_of("qwen").path, tmp_path, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(ValueError, match=f"unknown tensor {re.escape(name)}"):
        load_family(path).check()


def test_old_frequencies_and_an_equal_head_are_skipped(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tiny, tokens = tiny_of(RE_SAVED), random_tokens(9)
    family = load_family(edit(tiny.path, tmp_path, add))
    family.check()
    model = load_fp32(family)
    assert model.lm_head is None
    assert relative_error(full_logits(model, tokens), tiny.logits(tokens)) < BOUND


def test_a_tied_head_that_differs_is_used(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    tiny, tokens = tiny_of(RE_SAVED), random_tokens(9)
    other = torch.randn(256, 64, generator=torch.Generator().manual_seed(9))
    path = edit(tiny.path, tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    steps = Steps(load_fp32(load_family(path)))
    hidden = steps.forward((0, tokens, 0))[0]
    assert relative_error(steps.model.logits(hidden), hidden @ other.T) < 1e-5


def test_several_layers_and_sizes_are_served(tmp_path: Path) -> None:
    """Check sizes at their limits: every token picks all experts, and there is one head of each kind."""
    sizes = {
        "num_experts_per_tok": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_value_head_dim": 33,
        "linear_key_head_dim": 48,
        "linear_conv_kernel_dim": 2,
    }
    tiny, tokens = write_qwen(tmp_path, "qwen", **sizes), random_tokens(LENGTH)
    model = load_fp32(load_family(tmp_path))
    assert relative_error(full_logits(model, tokens), tiny.logits(tokens)) < BOUND
