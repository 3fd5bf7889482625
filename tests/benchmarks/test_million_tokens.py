"""The test runs the benchmark's checks of one process with short prompts, so that the benchmark does not rot."""

from __future__ import annotations

import asyncio

from benchmarks.long_context import long_model
from benchmarks.million_tokens import MAX_REQUESTS, NUM_READ, measure
from model.demo import DEMO
from services.args import AppArgs

NUM_TOKENS, CONTEXT = 20_000, 21_000


def test_every_check_passes_at_a_shorter_length() -> None:
    with long_model(DEMO, CONTEXT) as model:
        args = AppArgs(model=model, experts="local", dtype="float32", max_requests=MAX_REQUESTS)
        results = asyncio.run(measure(args, NUM_TOKENS, num_output=8))
    assert not results["failed"]
    assert results["refusal"] == (
        f"The prompt of {CONTEXT} tokens and an answer of 1 make {CONTEXT + 1} tokens; "
        f"at most {CONTEXT} are allowed, the model's context."
    )
    assert {NUM_TOKENS - NUM_READ, NUM_TOKENS} <= set(results["saved_lens"])
