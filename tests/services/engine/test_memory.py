import pytest
import torch

from model.state import PagedSpec, RecurrentSpec, State, StateSpec
from services.engine.memory import IdPool, plan_memory

SPEC = StateSpec(
    paged=(PagedSpec(1, (2, 2, 16)), PagedSpec(3, (2, 2, 16))),
    recurrent=(RecurrentSpec(0, ((8, 3), (4, 8)), (None, torch.float32)),),
)


def test_pool_gives_each_id_to_one_owner() -> None:
    pool = IdPool(5)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert not pool.can_take(1)
    pool.give_back(second)
    assert (pool.num_free, pool.num_taken) == (3, 2)
    assert sorted(pool.take(3)) == sorted(second)


def test_pool_notices_ids_that_come_back_twice() -> None:
    pool = IdPool(3)
    ids = pool.take(1)
    with pytest.raises(AssertionError):
        pool.give_back([*ids, *ids])
    pool = IdPool(3)
    with pytest.raises(AssertionError):
        pool.give_back([0])


@pytest.mark.parametrize("budget", [300_000, 1_000_000, 50_000_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plan_is_what_is_allocated_and_within_budget(budget: int, dtype: torch.dtype) -> None:
    plan = plan_memory(SPEC, dtype, budget, max_model_len=500, max_requests=16)
    state = State(SPEC, plan.num_slots, plan.num_blocks, dtype)
    assert state.nbytes == plan.nbytes <= budget
    assert plan.num_blocks * plan.block_size >= 500
    assert f"{plan.num_slots} requests" in str(plan)


def test_plan_takes_no_more_than_requests_can_use() -> None:
    plan = plan_memory(SPEC, torch.float32, 10**9, max_model_len=100, max_requests=4)
    assert (plan.num_slots, plan.num_blocks) == (4, 4 * 7)


def test_plan_for_models_with_one_kind_of_state() -> None:
    only_slots, only_pages = StateSpec((), SPEC.recurrent), StateSpec(SPEC.paged, ())
    assert plan_memory(only_slots, torch.float32, 10**4, 4096, 1000).num_slots == 10**4 // 224
    assert plan_memory(only_pages, torch.float32, 512 * 16 * 10, 160, 8).num_slots == 1


def test_plan_refuses_a_budget_below_one_request() -> None:
    with pytest.raises(ValueError, match=r"takes 135,344 bytes, but the state budget is 1,000 bytes; raise"):
        plan_memory(SPEC, torch.bfloat16, 1000, max_model_len=512 + 8, max_requests=1)
