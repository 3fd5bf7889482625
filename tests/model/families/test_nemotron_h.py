"""The tests check what only Nemotron has; `test_every_family.py` compares its logits with those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.families.nemotron_h import NemotronH
from model.families.registry import load_family
from tests.model import oracles
from tests.model.checkpoints import DRAFTING, SMALL_STEPS, Tiny, edit, mamba_mixers
from tests.model.conftest import load_fp32
from tests.model.steps import Steps, full_logits, random_tokens, relative_error

BOUND = 1e-4  # the largest relative error that the project allows; measured errors are near 1e-6


def test_a_slot_used_again_starts_from_zeros(latent_model: NemotronH) -> None:
    steps = Steps(latent_model)
    steps.forward((0, random_tokens(20, seed=1), 0))
    tokens = random_tokens(9, seed=2)
    assert torch.equal(steps.logits((0, tokens, 0))[0], full_logits(latent_model, tokens))


def test_the_small_steps_would_show_a_clamp(tiny_of: Callable[[str], Tiny]) -> None:
    """Check that the checkpoint SMALL_STEPS reveals a clamp of Δ: transformers' lower limit changes the logits."""
    tiny, tokens = tiny_of(SMALL_STEPS), random_tokens(21)
    exact = tiny.logits(tokens)
    mixers = mamba_mixers(tiny.oracle)
    for mixer in mixers:
        mixer.time_step_limit = (0.001, float("inf"))
    clamped = tiny.logits(tokens)
    for mixer in mixers:
        mixer.time_step_limit = (0.0, float("inf"))
    assert relative_error(clamped, exact) > 10 * BOUND


def test_bfloat16_is_near_fp32(latent: Tiny, latent_model: NemotronH) -> None:
    family, tokens = load_family(latent.path), random_tokens(21)
    model = family.load_backbone(family.load_local_experts(torch.bfloat16), torch.bfloat16)
    router = model.state_dict()["layers.1.mixer.gate.weight"]
    assert model.embeddings.weight.dtype == torch.bfloat16
    assert router.dtype == torch.float32
    error = (full_logits(model, tokens) - full_logits(latent_model, tokens)).double().square().mean()
    assert error < 0.02 * full_logits(latent_model, tokens).double().square().mean()


# MTP ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=DRAFTING)
def drafting(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of(request.param)


@pytest.fixture(params=["compiled", "plain"])
def drafting_model(request: pytest.FixtureRequest, drafting: Tiny, model_of: Callable[..., NemotronH]) -> NemotronH:
    return model_of(drafting.name, request.param == "plain")


@pytest.fixture
def tensors(drafting: Tiny) -> dict[str, Tensor]:
    return load_file(drafting.plain / "model.safetensors")


def test_draft_equals_the_equations(drafting: Tiny, drafting_model: NemotronH, tensors: dict[str, Tensor]) -> None:
    tokens, steps = random_tokens(22), Steps(drafting_model)
    hidden = steps.forward((0, tokens[:21], 0))[0]
    expected = oracles.draft(tensors, drafting.raw, hidden, tokens[1:])
    assert relative_error(steps.draft(hidden, tokens[1:], 0), expected) < 1e-5


def test_draft_one_token_at_a_time_equals_the_equations(
    drafting: Tiny, drafting_model: NemotronH, tensors: dict[str, Tensor]
) -> None:
    tokens, steps = random_tokens(19), Steps(drafting_model)
    hidden = steps.forward((3, tokens[:18], 0))[0]
    found = [steps.draft(hidden[t : t + 1], tokens[t + 1 : t + 2], t, slot=3) for t in range(18)]
    assert relative_error(torch.cat(found), oracles.draft(tensors, drafting.raw, hidden, tokens[1:])) < 1e-5


def test_second_draft_feeds_the_first_back(
    drafting: Tiny, drafting_model: NemotronH, tensors: dict[str, Tensor]
) -> None:
    """Check the second draft against the oracle, computed as in serving and as in training.

    In serving, the MTP module runs one more position on the same KV, with its own first draft and output as inputs. In
    training, the MTP module runs a second full pass over the whole sequence.
    """
    tokens, steps = random_tokens(18), Steps(drafting_model)
    hidden = steps.forward((0, tokens[:17], 0))[0]
    first = steps.draft(hidden, tokens[1:], 0)
    drafted = int(drafting_model.logits(first[-1]).argmax())
    second = steps.draft(first[-1:], [drafted], 17)
    inputs, next_ids = torch.cat([hidden, first[-1:]]), [*tokens[1:], drafted]
    assert relative_error(second[0], oracles.draft(tensors, drafting.raw, inputs, next_ids)[-1]) < 1e-5
    whole = Steps(drafting_model).draft(first[:-1], tokens[2:], 0)
    assert relative_error(whole, oracles.draft(tensors, drafting.raw, first[:-1], tokens[2:])) < 1e-5


def test_drafting_leaves_the_backbone_as_it_is(latent_model: NemotronH) -> None:
    tokens, steps = random_tokens(30), Steps(latent_model)
    hidden = steps.forward((0, tokens[:20], 0))[0]
    steps.draft(hidden, tokens[1:21], 0)
    later = steps.logits((0, tokens[20:], 20))[0]
    assert relative_error(later, full_logits(latent_model, tokens)[20:]) < 1e-5


def test_a_checkpoint_without_mtp_is_served_without_drafting(tiny_of: Callable[[str], Tiny]) -> None:
    family = load_family(tiny_of(SMALL_STEPS).path)
    assert family.config.num_nextn_predict_layers == 1
    assert not family.has_mtp
    assert [shape.layer for shape in family.expert_shapes] == [2]
    assert load_fp32(family).mtp is None


def test_mtp_is_never_dropped(latent: Tiny, latent_model: NemotronH) -> None:
    family = load_family(latent.path)
    assert family.has_mtp
    assert [shape.layer for shape in family.expert_shapes] == [1, 4, 6, 8]
    assert latent_model.mtp is not None


@pytest.mark.parametrize("name", ["0.eh_proj.weight", "1.final_layernorm.weight", "1.mixer.experts.3.up_proj.weight"])
def test_a_missing_mtp_tensor_is_named(latent: Tiny, tmp_path: Path, name: str) -> None:
    family = load_family(edit(latent.path, tmp_path, lambda tensors: tensors.pop(f"mtp.layers.{name}")))
    with pytest.raises(ValueError, match=f"no tensor mtp.layers.{name}"):
        load_fp32(family)


def test_transformers_ignores_the_mtp_tensors(latent: Tiny) -> None:
    again = type(latent.oracle).from_pretrained(latent.path, experts_implementation="eager")
    tokens = torch.tensor([random_tokens(9)])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, latent.oracle(tokens).logits)
