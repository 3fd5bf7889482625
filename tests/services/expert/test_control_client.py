"""These tests check that a canary compares the sums of two homes for the same rows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.family import ModelFamily
from services.expert import control_client
from services.expert.shard import ExpertShard
from tests.services.expert.serving import CONFIG, run, serving
from tests.services.expert.weights.test_transfer import damaged

EXPERTS = {1: [0, 3, 7], 3: [7]}


@asynccontextmanager
async def pair(
    family: ModelFamily, other: ModelFamily, dtype: torch.dtype = torch.float32
) -> AsyncIterator[tuple[ExpertShard, ExpertShard, dict[str, Any]]]:
    async with (
        serving(family, config=replace(CONFIG, dtype=dtype)) as old,
        serving(other, config=replace(CONFIG, dtype=dtype)) as new,
    ):
        gains = (await control_client.load(old.endpoint, EXPERTS)).gains
        await control_client.load(new.endpoint, {1: [0, 3]}, 1, {1: [7], 3: [7]})
        yield old, new, {"shapes": family.expert_shapes, "dtype": dtype, "gains": gains}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_home_agrees(family: ModelFamily, dtype: torch.dtype) -> None:
    async def test() -> None:
        async with pair(family, family, dtype) as (old, new, model):
            assert await control_client.canary(old.endpoint, new.endpoint, EXPERTS, **model) == []

    run(test)


def test_one_wrong_weight_is_found(family: ModelFamily, model_dir: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with pair(family, damaged(tmp_path, model_dir, family, 7)) as (old, new, model):
            assert await control_client.canary(old.endpoint, new.endpoint, EXPERTS, **model) == [(1, 7)]
            assert await control_client.canary(old.endpoint, new.endpoint, {3: [7]}, **model) == []

    run(test)


def test_a_home_that_does_not_compute_is_an_error(family: ModelFamily) -> None:
    async def test() -> None:
        async with pair(family, family) as (old, new, model):
            with pytest.raises(control_client.ShardError, match=r"Experts \[9\] of layer 1 are not held here"):
                await control_client.canary(old.endpoint, new.endpoint, {1: [0, 9]}, **model)

    run(test)


def test_other_devices_may_differ_a_little() -> None:
    old = np.array([[1000, -2000], [1000, -2000], [5, 5]], np.int32)
    new = np.array([[1000, -2000], [1001, -2000], [5, 5000]], np.int64)
    assert control_client.sums_agree(old, new, 0.0).tolist() == [True, False, False]
    assert control_client.sums_agree(old, new, 1e-3).tolist() == [True, True, False]
    huge = np.array([[2**61]]), np.array([[2**61 + 1]])
    assert not control_client.sums_agree(*huge, 0.0).any()
