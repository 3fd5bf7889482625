"""The tests compare logits bit for bit to check that a token's logits depend only on the token's own sequence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from model import kernels
from model.blocks.recurrent_mixer import RecurrentMixer
from model.families.checkpoint_family import BackboneModule
from model.families.registry import load_family
from model.state import Batch
from tests.model.checkpoints import WITH_MTP, Tiny
from tests.model.steps import Steps, full_logits, random_tokens
from tests.model.variants import VARIANTS

OTHERS = ("deepseek", "deepseek_odd", "qwen", "qwen_odd")
DTYPES = (torch.float32, torch.bfloat16)
LENGTH = 50


@pytest.fixture(params=DTYPES, ids=str)
def with_mtp(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> BackboneModule:
    family = load_family(tiny_of(WITH_MTP).path)
    return family.load_backbone(family.load_local_experts(request.param), request.param)


@pytest.fixture(params=[(name, dtype) for name in (WITH_MTP, "odd", *OTHERS) for dtype in DTYPES], ids=str)
def exact(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> BackboneModule:
    """Return a model of which every block has compiled kernels, or one with blocks in plain PyTorch ("odd")."""
    name, dtype = request.param
    family = load_family(tiny_of(name).path)
    return family.load_backbone(family.load_local_experts(dtype), dtype)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_way_to_cut_a_sequence_gives_the_same_bits(
    tiny_of: Callable[[str], Tiny], name: str, dtype: torch.dtype
) -> None:
    family = load_family(tiny_of(name).path)
    model = family.load_backbone(family.load_local_experts(dtype), dtype)
    tokens, chooser = random_tokens(LENGTH), random.Random(0)
    whole = full_logits(model, tokens)
    for num_cuts in (1, 5, 20, LENGTH - 1):
        ends = [*sorted(chooser.sample(range(1, LENGTH), num_cuts)), LENGTH]
        steps = Steps(model)
        parts = [steps.logits((0, tokens[a:b], a))[0] for a, b in zip([0, *ends], ends, strict=False)]
        assert torch.equal(torch.cat(parts), whole), ends


@pytest.mark.parametrize("seed", range(6))
def test_company_changes_no_bit(exact: BackboneModule, seed: int) -> None:
    """Check that six requests in random parts and random batches get the same logits as when each runs alone."""
    chooser = random.Random(seed)
    prompts = {slot: random_tokens(chooser.randint(1, LENGTH), seed=100 * seed + slot) for slot in range(6)}
    done, found, steps = dict.fromkeys(prompts, 0), {slot: list[Tensor]() for slot in prompts}, Steps(exact)
    while open_slots := [slot for slot in prompts if done[slot] < len(prompts[slot])]:
        chosen = chooser.sample(open_slots, chooser.randint(1, len(open_slots)))
        takes = {slot: chooser.choice((1, 1, 2, 7, LENGTH)) for slot in chosen}
        parts = [(slot, prompts[slot][done[slot] : done[slot] + take], done[slot]) for slot, take in takes.items()]
        for (slot, ids, _), logits in zip(parts, steps.logits(*parts), strict=True):
            found[slot].append(logits)
            done[slot] += len(ids)
    for slot, tokens in prompts.items():
        assert torch.equal(torch.cat(found[slot]), full_logits(exact, tokens))


def with_drafts(batch: Batch, num_drafts: Sequence[int]) -> Batch:
    fields = (batch.token_ids_T, batch.lens, batch.context_lens, batch.slots, batch.block_tables)
    return Batch(*fields, num_drafts=tuple(num_drafts))


@pytest.mark.parametrize("num_right", range(4))
def test_drafts_leave_no_trace(exact: BackboneModule, num_right: int) -> None:
    """Check that a sequence with three drafts, of which some are accepted, continues as if there had been no drafts."""
    tokens, other = random_tokens(30), random_tokens(30, seed=1)
    whole, whole_other = full_logits(exact, tokens), full_logits(exact, other)
    wrong = [(token + 1) % 256 for token in tokens]
    steps = Steps(exact)
    steps.logits((3, tokens[:12], 0), (1, other[:9], 0))
    drafts = [*tokens[13 : 13 + num_right], *wrong[13 + num_right : 16]]
    batch = with_drafts(steps.batch([(3, [tokens[12], *drafts], 12), (1, other[9:11], 9)]), (3, 0))
    rows_kept = {4} if any(isinstance(module, RecurrentMixer) for module in exact.modules()) else set()  # of slot 3
    with torch.no_grad():
        logits = exact.logits(exact(batch, steps.state))
        assert {len(part) for kept in steps.state.uncommitted.values() for part in kept} == rows_kept
        exact.commit(batch, [num_right, 0], steps.state)
    assert torch.equal(logits[: num_right + 1], whole[12 : 13 + num_right])
    assert torch.equal(logits[4:], whole_other[9:11])
    assert not steps.state.uncommitted
    end = 13 + num_right
    rest, rest_other = steps.logits((3, tokens[end:], end), (1, other[11:], 11))
    assert torch.equal(rest, whole[end:])
    assert torch.equal(rest_other, whole_other[11:])


@pytest.mark.parametrize("num_right", [0, 2])
@pytest.mark.parametrize("name", [WITH_MTP, "qwen"])
def test_plain_pytorch_takes_drafts_back_too(
    model_of: Callable[..., BackboneModule], name: str, num_right: int
) -> None:
    model, tokens = model_of(name, True), random_tokens(30)
    steps, whole = Steps(model), full_logits(model, tokens)
    steps.logits((0, tokens[:12], 0))
    batch = with_drafts(steps.batch([(0, [tokens[12], *tokens[13 : 13 + num_right], 7], 12)]), (num_right + 1,))
    with torch.no_grad():
        model(batch, steps.state)
        model.commit(batch, [num_right], steps.state)
    end = 13 + num_right
    torch.testing.assert_close(steps.logits((0, tokens[end:], end))[0], whole[end:], rtol=1e-4, atol=1e-5)


def test_copied_state_and_pages_go_on_as_the_original(exact: BackboneModule) -> None:
    tokens, steps = random_tokens(LENGTH), Steps(exact)
    steps.logits((0, tokens[:20], 0))
    steps.state.copy_slots([(0, 4)])
    pages = [steps.batch([(slot, [1], 0)]).block_tables[0] for slot in (0, 4)]
    steps.state.copy_pages(list(zip(*pages, strict=True)))
    steps.logits((0, random_tokens(9, seed=3), 20))  # first, the original continues with other tokens
    assert torch.equal(steps.logits((4, tokens[20:], 20))[0], full_logits(exact, tokens)[20:])


@pytest.mark.parametrize("name", [WITH_MTP, *OTHERS])
def test_the_first_keys_hide_what_lies_before(model_of: Callable[..., BackboneModule], name: str) -> None:
    """Check that a request ignores the keys before its first key, with the CPU kernels and in plain PyTorch."""
    tokens = random_tokens(20)
    for is_plain in (False, True):
        model = model_of(name, is_plain)
        steps, late = Steps(model), Steps(model)
        hidden = steps.forward((0, tokens, 0))[0]
        shown = steps.draft(hidden[5:15], tokens[6:16], 0)
        batch = late.batch([(0, tokens[6:16], 6)])
        fields = (batch.token_ids_T, batch.lens, batch.context_lens, batch.slots, batch.block_tables)
        for pages in late.state.pages.values():
            pages.fill_(0)
        with torch.no_grad():
            hidden_late = model.draft(Batch(*fields, first_keys=(6,)), hidden[5:15], late.state)
        torch.testing.assert_close(hidden_late, shown, rtol=1e-4, atol=1e-5)


def test_the_promise_is_made_for_this_machine() -> None:
    assert kernels.is_reproducible("cpu")
