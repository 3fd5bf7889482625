"""The tests measure the memory that drafting needs beside the requests' state, on a model with wide vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.families.nemotron_h import NemotronH, NemotronHFamily
from model.state import Batch, State
from services.args import AppArgs
from services.engine.contract.sampling_params import SamplingParams
from services.engine.drafting.draft_depth import DEFAULT_DRAFT_TOKENS, MAX_UNREAD
from services.engine.drafting.drafter import bytes_per_request
from services.engine.request import Request
from services.engine.runner import Runner
from services.engine.scheduling.scheduled_batch import ScheduledBatch
from tests.services.demo import MODEL

HIDDEN, MAX_LEN, PROMPT_LEN = 2048, 512, MAX_UNREAD + 40


def wide_family() -> NemotronHFamily:
    """Return the demo's model family, but with hidden vectors of HIDDEN numbers: eight times as many."""
    family = NemotronHFamily(Checkpoint(MODEL))
    config = family.config
    mamba, attention = (replace(shape, hidden_size=HIDDEN) for shape in (config.mamba, config.attention))
    family.config = replace(config, hidden_size=HIDDEN, mamba=mamba, attention=attention)
    return family


class Watched(NemotronH):
    """A `Watched` model records how many bytes a step with drafts keeps until `commit` is called."""

    kept_bytes = 0

    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State) -> None:
        self.kept_bytes = sum(part.nbytes for kept in state.uncommitted.values() for part in kept)
        super().commit(batch, num_accepted, state)


def no_experts(_layer: int, x_NL: Tensor, _ids_NK: Tensor, _weights_NK: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.zeros_like(x_NL)


def wide_model(family: NemotronHFamily) -> Watched:
    torch.manual_seed(0)
    model = Watched(family.config, no_experts)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def run(runner: Runner, requests: list[Request], lens: int, num_drafts: int) -> None:
    """Run one step that verifies `num_drafts` drafts among `lens` tokens of each request, and makes no new drafts."""
    count = len(requests)
    batch = ScheduledBatch(tuple(requests), (lens,) * count, (num_drafts,) * count, (0,) * count)
    for request, result in zip(requests, runner.run(batch), strict=True):
        assert result.tokens
        request.num_computed_tokens += lens - num_drafts + len(result.tokens) - 1
        request.token_ids += [sampled.token_id for sampled in result.tokens]


@pytest.mark.parametrize("draft_tokens", [None, 16])
def test_the_plan_is_what_requests_take_that_are_drafted_for(draft_tokens: int | None) -> None:
    family = wide_family()
    num_drafts = draft_tokens or DEFAULT_DRAFT_TOKENS
    args: dict[str, Any] = {"max_model_len": MAX_LEN, "max_requests": 3, "draft_tokens": draft_tokens}
    plan = AppArgs(**args).memory_plan(family)
    state = State(family.config.state_spec, plan.num_state_slots, plan.num_blocks, torch.float32)
    runner = Runner(wide_model(family), state)
    pages = plan.num_blocks // plan.num_slots
    requests = []
    for n in range(plan.num_slots):
        prompt = [(7 * n + i) % 1000 for i in range(PROMPT_LEN)]
        params = SamplingParams(temperature=0)
        requests.append(Request(str(n), prompt, params, seed=0, max_len=MAX_LEN, slot=n))
        requests[-1].block_table = list(range(n * pages, (n + 1) * pages))
    run(runner, requests, PROMPT_LEN, 0)
    assert runner.drafter is not None
    unread = sum(rows.nbytes for each in runner.drafter._unread.values() for rows in each.rows)
    for request in requests:
        request.draft_ids = tuple(range(1, num_drafts + 1))
    run(runner, requests, 1 + num_drafts, num_drafts)
    used = state.nbytes + unread + runner.model.kept_bytes  # type: ignore[attr-defined]
    assert used == pytest.approx(plan.nbytes, rel=0.05)
    assert used - state.nbytes == pytest.approx(plan.num_slots * bytes_per_request(family.config, num_drafts), rel=0.05)


def test_without_drafts_nothing_is_kept_for_them() -> None:
    family = wide_family()
    with_drafts, without = (AppArgs(draft_tokens=n).memory_plan(family) for n in (4, 0))
    assert bytes_per_request(family.config, 0) == 0
    beside = without.num_slots * bytes_per_request(family.config, 4)
    assert beside > 0
    assert with_drafts.nbytes == pytest.approx(without.nbytes + beside, rel=0.05)
