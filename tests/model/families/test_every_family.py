"""The tests run every variant of every family, and compare it with transformers and with itself in one full pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.families.checkpoint_family import BackboneModule
from model.families.registry import load_family
from tests.model.checkpoints import Tiny
from tests.model.conftest import load_fp32
from tests.model.steps import Steps, full_logits, greedy, random_tokens, relative_error, split_logits
from tests.model.variants import QUANTIZED

LENGTHS = (1, 2, 8, 21, 37)
BOUND = 1e-4  # the largest relative error that the project allows; measured errors are near 1e-6


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_equal_transformers(tiny: Tiny, model: BackboneModule, length: int) -> None:
    tokens = random_tokens(length, seed=length)
    assert relative_error(full_logits(model, tokens), tiny.logits(tokens)) < BOUND


def test_greedy_tokens_are_identical_to_transformers(tiny: Tiny, model: BackboneModule) -> None:
    prompt = random_tokens(13, seed=5)
    assert greedy(model, prompt, 24) == tiny.generate(prompt, 24)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("is_plain", [False, True], ids=["compiled", "plain"])
def test_a_quantized_model_gives_the_bits_of_its_dequantized_weights(
    tiny_of: Callable[[str], Tiny], model_of: Callable[..., BackboneModule], name: str, is_plain: bool
) -> None:
    tiny, tokens = tiny_of(name), random_tokens(37)
    dequantized = load_fp32(load_family(tiny.plain), is_plain)
    assert torch.equal(full_logits(model_of(name, is_plain), tokens), full_logits(dequantized, tokens))


@pytest.mark.parametrize("cuts", [[8], [16, 32], [5, 6, 19], [1], [36], [3, 4, 5, 30]], ids=str)
def test_chunked_prefill_equals_the_full_pass(model: BackboneModule, cuts: list[int]) -> None:
    tokens = random_tokens(37)
    assert relative_error(split_logits(model, tokens, cuts), full_logits(model, tokens)) < 1e-5


def test_step_by_step_decode_equals_the_full_pass(model: BackboneModule) -> None:
    tokens = random_tokens(37)
    assert relative_error(split_logits(model, tokens, list(range(1, 37))), full_logits(model, tokens)) < 1e-5


def test_packed_mixed_batches_equal_single_runs(model: BackboneModule) -> None:
    """Check steps with new requests, later chunks of prompts and decoding requests, whose slots are in any order."""
    prompts = {slot: random_tokens(length, seed=slot) for slot, length in ((4, 30), (1, 12), (5, 21), (0, 7), (2, 1))}
    alone = {slot: full_logits(model, tokens) for slot, tokens in prompts.items()}
    steps, done, found = Steps(model), dict.fromkeys(prompts, 0), {slot: list[Tensor]() for slot in prompts}
    plan = [{4: 16, 1: 11}, {5: 8, 1: 1, 4: 13}, {0: 7, 2: 1, 4: 1, 5: 13}]
    for step in plan:
        parts = [(slot, prompts[slot][done[slot] : done[slot] + num], done[slot]) for slot, num in step.items()]
        for (slot, tokens, _), logits in zip(parts, steps.logits(*parts), strict=True):
            found[slot].append(logits)
            done[slot] += len(tokens)
    for slot, tokens in prompts.items():
        assert done[slot] == len(tokens)
        assert relative_error(torch.cat(found[slot]), alone[slot]) < 1e-5
