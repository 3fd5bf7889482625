"""The tests compare DeepSeek-V3 and its MTP module with equations in float64, and check which tensors are read."""

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
from model.families.registry import load_family
from model.state import Batch
from tests.model.checkpoints import Tiny, edit, edit_config
from tests.model.conftest import load_fp32
from tests.model.deepseek_checkpoints import DRAFTING, SEVERAL_FILES, TINY_LATENTS, VARIANTS
from tests.model.deepseek_oracle import DeepseekOracle
from tests.model.steps import Steps, full_logits, random_tokens, relative_error

BASIC = "deepseek"


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of(request.param)


@pytest.fixture(params=DRAFTING)
def drafting(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of(request.param)


@pytest.fixture(params=[False, True], ids=["compiled", "plain"])
def is_plain(request: pytest.FixtureRequest) -> bool:
    return request.param


def oracle_of(tiny: Tiny) -> DeepseekOracle:
    tensors: dict[str, Tensor] = {}
    for file in tiny.plain.glob("*.safetensors"):
        tensors |= load_file(file)
    return DeepseekOracle(tensors, tiny.raw)


def test_logits_equal_the_equations(variant: Tiny, model_of: Callable[..., BackboneModule], is_plain: bool) -> None:
    oracle, tokens = oracle_of(variant), random_tokens(37)
    expected = oracle.logits(oracle.hidden(tokens))
    assert relative_error(full_logits(model_of(variant.name, is_plain), tokens), expected) < 1e-5


def test_the_tiny_latents_would_show_another_epsilon(tiny_of: Callable[[str], Tiny]) -> None:
    tiny, tokens = tiny_of(TINY_LATENTS), random_tokens(12)
    exact = tiny.logits(tokens)
    norms: list[Any] = [layer.self_attn.kv_a_layernorm for layer in tiny.oracle.model.layers]
    assert {norm.variance_epsilon for norm in norms} == {1e-6}
    for norm in norms:
        norm.variance_epsilon = tiny.raw["rms_norm_eps"]
    other = tiny.logits(tokens)
    for norm in norms:
        norm.variance_epsilon = 1e-6
    assert relative_error(other, exact) > 0.01


def test_every_token_keeps_one_latent_and_one_key_per_layer(variant: Tiny) -> None:
    spec, raw = load_family(variant.path).config.state_spec, variant.raw
    assert {paged.shape for paged in spec.paged} == {(raw["kv_lora_rank"] + raw["qk_rope_head_dim"],)}
    assert len(spec.paged) == raw["num_hidden_layers"] + raw["num_nextn_predict_layers"]
    assert spec.recurrent == ()


@pytest.mark.parametrize("name", [BASIC, "deepseek_odd"])
def test_a_request_goes_on_from_the_pages_of_another(model_of: Callable[..., BackboneModule], name: str) -> None:
    """Check that full pages are all that the prefix cache must keep, because the model has no recurrent state."""
    model, tokens = model_of(name), random_tokens(50)
    steps, size = Steps(model), 16
    steps.logits((0, tokens[:40], 0))
    steps.logits((3, random_tokens(20, seed=1), 0))
    batch = steps.batch([(2, tokens[2 * size :], 2 * size)])
    shared = (*steps.batch([(0, [1], 0)]).block_tables[0][:2], *batch.block_tables[0][2:])
    fields = (batch.token_ids_T, batch.lens, batch.context_lens, batch.slots, (shared,))
    with torch.no_grad():
        logits = model.logits(model(Batch(*fields), steps.state))
    assert torch.equal(logits, full_logits(model, tokens)[2 * size :])


def test_the_router_of_a_bfloat16_model_is_fp32(tiny_of: Callable[[str], Tiny]) -> None:
    family = load_family(tiny_of(BASIC).path)
    weights = family.load_backbone(family.load_local_experts(torch.bfloat16), torch.bfloat16).state_dict()
    for name in ("weight", "e_score_correction_bias"):
        stored = family.checkpoint.tensor(f"model.layers.1.mlp.gate.{name}")
        assert torch.equal(weights[f"layers.1.mlp.mixer.gate.{name}"], stored)
    assert weights["layers.1.mlp.norm.weight"].dtype == torch.bfloat16


# MTP ------------------------------------------------------------------------------------------------------------------


def test_draft_equals_the_equations(drafting: Tiny, model_of: Callable[..., BackboneModule], is_plain: bool) -> None:
    tokens, steps = random_tokens(22), Steps(model_of(drafting.name, is_plain))
    hidden = steps.forward((0, tokens[:21], 0))[0]
    expected = oracle_of(drafting).draft(hidden, tokens[1:])
    assert relative_error(steps.draft(hidden, tokens[1:], 0), expected) < 1e-5


def test_draft_reads_the_vector_after_the_final_norm(tiny_of: Callable[[str], Tiny]) -> None:
    """Check the draft's input against the oracle's own hidden vectors, from the tokens on."""
    tiny, tokens = tiny_of(BASIC), random_tokens(18)
    oracle, steps = oracle_of(tiny), Steps(load_fp32(load_family(tiny.path)))
    hidden = steps.forward((0, tokens[:17], 0))[0]
    expected = oracle.draft(oracle.hidden(tokens[:17]), tokens[1:])
    assert relative_error(steps.draft(hidden, tokens[1:], 0), expected) < 1e-5


def test_draft_one_token_at_a_time_gives_the_same_bits(drafting: Tiny, model_of: Callable[..., BackboneModule]) -> None:
    tokens, steps = random_tokens(19), Steps(model_of(drafting.name))
    hidden = steps.forward((3, tokens[:18], 0))[0]
    whole = steps.draft(hidden, tokens[1:], 0, slot=3)
    found = [steps.draft(hidden[t : t + 1], tokens[t + 1 : t + 2], t, slot=3) for t in range(18)]
    assert torch.equal(torch.cat(found), whole)


def test_second_draft_feeds_the_first_back(
    drafting: Tiny, model_of: Callable[..., BackboneModule], is_plain: bool
) -> None:
    model, tokens = model_of(drafting.name, is_plain), random_tokens(18)
    steps, oracle = Steps(model), oracle_of(drafting)
    hidden = steps.forward((0, tokens[:17], 0))[0]
    first = steps.draft(hidden, tokens[1:], 0)
    drafted = int(model.logits(first[-1]).argmax())
    assert drafted == int(oracle.logits(oracle.draft(hidden, tokens[1:])[-1]).argmax())
    second = steps.draft(first[-1:], [drafted], 17)
    inputs, next_ids = torch.cat([hidden, first[-1:]]), [*tokens[1:], drafted]
    assert relative_error(second[0], oracle.draft(inputs, next_ids)[-1]) < 1e-5


def test_the_positions_of_drafts_are_relative(model_of: Callable[..., BackboneModule], is_plain: bool) -> None:
    """Check that the engine may count the draft module's positions from 1 instead of 0."""
    model, tokens = model_of(BASIC, is_plain), random_tokens(22)
    steps = Steps(model)
    hidden = steps.forward((0, tokens[:21], 0))[0]
    shown = steps.draft(hidden, tokens[1:], 0)
    batch = steps.batch([(1, tokens[1:], 1)])
    fields = (batch.token_ids_T, batch.lens, batch.context_lens, batch.slots, batch.block_tables)
    steps.state.pages[model.config.num_layers].fill_(0)
    with torch.no_grad():
        moved = model.draft(Batch(*fields, first_keys=(1,)), hidden, steps.state)
    assert relative_error(moved, shown) < 1e-5


# Tensors --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_checked_from_its_headers(variant: Tiny) -> None:
    family = load_family(variant.path)
    family.check()
    assert family.has_mtp == (variant.name in DRAFTING)
    num_dense, num_layers = variant.raw["first_k_dense_replace"], variant.raw["num_hidden_layers"]
    assert [shape.layer for shape in family.expert_shapes] == [*range(num_dense, num_layers + family.has_mtp)]
    assert {shape.kind for shape in family.expert_shapes} == {"swiglu"}
    assert len(list(variant.path.glob("*.safetensors"))) == (3 if variant.name == SEVERAL_FILES else 1)


def test_a_checkpoint_without_mtp_is_served_without_drafting(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Check a checkpoint that transformers has saved: its config asks for an MTP module, but it has no layer 3."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    tokens = random_tokens(9)
    family = load_family(edit(tiny_of(BASIC).path, tmp_path, drop))
    assert family.config.num_nextn_predict_layers == 1
    assert not family.has_mtp
    model = load_fp32(family)
    assert not model.has_drafts
    assert torch.equal(full_logits(model, tokens), full_logits(load_fp32(load_family(tiny_of(BASIC).path)), tokens))


@pytest.mark.parametrize(
    "name",
    [
        "layers.3.eh_proj.weight",
        "layers.3.shared_head.norm.weight",
        "layers.3.mlp.experts.3.up_proj.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.1.self_attn.kv_b_proj.weight",
        "layers.2.mlp.gate.e_score_correction_bias",
    ],
)
def test_a_missing_tensor_is_named(tiny_of: Callable[[str], Tiny], tmp_path: Path, name: str) -> None:
    family = load_family(edit(tiny_of(BASIC).path, tmp_path, lambda tensors: tensors.pop(f"model.{name}")))
    with pytest.raises(ValueError, match=re.escape(f"no tensor model.{name}")):
        family.check()


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"])
def test_the_copies_may_be_missing(tiny_of: Callable[[str], Tiny], tmp_path: Path, name: str) -> None:
    family = load_family(edit(tiny_of(BASIC).path, tmp_path, lambda tensors: tensors.pop(name)))
    family.check()
    assert family.has_mtp


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.4.eh_proj.weight"])
def test_an_unknown_tensor_is_refused(tiny_of: Callable[[str], Tiny], tmp_path: Path, name: str) -> None:
    family = load_family(edit(tiny_of(BASIC).path, tmp_path, lambda tensors: tensors.update({name: torch.ones(2, 2)})))
    with pytest.raises(ValueError, match=re.escape(f"the unknown tensor {name}")):
        family.check()


def test_a_tied_head_that_differs_is_used(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    tiny, tokens = tiny_of("deepseek_tied"), random_tokens(9)
    tied = load_fp32(load_family(tiny.path))
    assert tied.lm_head is None
    edit(tiny.path, tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(2))
    own = load_fp32(load_family(tmp_path))
    assert own.lm_head is not None
    assert relative_error(full_logits(own, tokens), 2 * full_logits(tied, tokens)) < 1e-6


def test_both_dialects_give_the_same_bits(tiny_of: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Check the config as transformers 5 writes it, with `rope_parameters`, against the public dialect."""
    tiny, tokens = tiny_of(BASIC), random_tokens(20)
    nested = {"rope_parameters": tiny.raw["rope_parameters"], "rope_scaling": None, "rope_theta": None}
    other = load_fp32(load_family(edit_config(tiny.path, tmp_path, **nested)))
    assert torch.equal(full_logits(other, tokens), full_logits(load_fp32(load_family(tiny.path)), tokens))
