import pytest
import torch

from model.configs.state_spec import PagedSpec, RecurrentSpec, StateSpec
from model.families.registry import load_family
from model.state import State
from services.engine.scheduling.memory import IdPool, PagePool, plan_memory
from tests.services.demo import MODEL

SPEC = StateSpec(
    paged=(PagedSpec(1, (2, 2, 16)), PagedSpec(3, (2, 2, 16))),
    recurrent=(RecurrentSpec(0, ((8, 3), (4, 8)), ("model", "float32")),),
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


def test_a_page_is_free_once_nobody_uses_or_keeps_it() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.keep(pages[0])
    assert (pool.num_taken, pool.num_idle, pool.num_free) == (2, 0, 1)
    pool.give_back(pages)
    pool.give_back(pages[:1])
    assert (pool.num_taken, pool.num_idle, pool.num_free) == (0, 1, 2)
    assert pool.is_idle(pages[0])
    pool.share(pages[:1])
    assert (pool.num_taken, pool.num_idle) == (1, 0)
    pool.drop(pages[0])
    pool.give_back(pages[:1])
    assert (pool.num_taken, pool.num_idle, pool.num_free) == (0, 0, 3)
    assert sorted(pool.take(3)) == [0, 1, 2]


@pytest.mark.parametrize("action", ["give_back", "share", "keep", "drop"])
def test_pages_that_are_free_belong_to_nobody(action: str) -> None:
    pool = PagePool(2)
    with pytest.raises(AssertionError):
        getattr(pool, action)(0 if action in ("keep", "drop") else [0])


@pytest.mark.parametrize("budget", [300_000, 1_000_000, 50_000_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plan_is_what_is_allocated_and_within_budget(budget: int, dtype: torch.dtype) -> None:
    plan = plan_memory(SPEC, dtype, budget, max_model_len=500, max_requests=16)
    state = State(SPEC, plan.num_state_slots, plan.num_blocks, dtype)
    assert state.nbytes == plan.nbytes <= budget
    assert plan.num_blocks * plan.block_size >= 500
    assert plan.num_checkpoint_slots * plan.bytes_per_slot <= budget / 4
    assert f"{plan.num_slots} requests" in str(plan)
    assert f"{plan.num_checkpoint_slots} saved states" in str(plan)


@pytest.mark.parametrize("gigabytes", [1, 8, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plan_of_a_large_machine_is_what_the_demo_allocates_there(gigabytes: int, dtype: torch.dtype) -> None:
    spec = load_family(MODEL).config.state_spec
    plan = plan_memory(spec, dtype, gigabytes << 30, max_model_len=4096, max_requests=10**6)
    state = State(spec, plan.num_state_slots, plan.num_blocks, dtype, device="meta")
    assert 0.95 * (gigabytes << 30) <= state.nbytes == plan.nbytes <= gigabytes << 30


def test_plan_takes_no_more_than_requests_can_use() -> None:
    plan = plan_memory(SPEC, torch.float32, 10**9, max_model_len=100, max_requests=4)
    assert (plan.num_slots, plan.num_blocks, plan.num_checkpoint_slots) == (4, 4 * 7, 4 * 8)
    plan = plan_memory(SPEC, torch.float32, 10**9, max_model_len=100, max_requests=4, checkpoint_share=0)
    assert (plan.num_slots, plan.num_blocks, plan.num_checkpoint_slots) == (4, 4 * 7, 0)


def test_plan_for_models_with_one_kind_of_state() -> None:
    only_slots, only_pages = StateSpec((), SPEC.recurrent), StateSpec(SPEC.paged, ())
    plan = plan_memory(only_slots, torch.float32, 10**4, 4096, 1000)
    assert plan.num_slots == 7500 // 224
    assert plan.num_state_slots == 10**4 // 224
    plan = plan_memory(only_pages, torch.float32, 512 * 16 * 10, 160, 8)
    assert (plan.num_slots, plan.num_blocks, plan.num_checkpoint_slots) == (1, 10, 0)


def test_the_longest_request_comes_before_saved_states() -> None:
    one = 224 + 32 * 8192
    assert plan_memory(SPEC, torch.float32, one, max_model_len=512, max_requests=4).num_checkpoint_slots == 0
    assert plan_memory(SPEC, torch.float32, one + 3 * 224, max_model_len=512, max_requests=4).num_checkpoint_slots == 3
    with pytest.raises(ValueError, match=r"checkpoint_share must be at least 0 and below 1, not 1\."):
        plan_memory(SPEC, torch.float32, one, 512, 4, checkpoint_share=1)


def test_plan_refuses_a_budget_below_one_request() -> None:
    with pytest.raises(ValueError, match=r"takes 135,344 bytes, but the state budget is 1,000 bytes; raise"):
        plan_memory(SPEC, torch.bfloat16, 1000, max_model_len=512 + 8, max_requests=1)


def test_plan_counts_what_requests_take_beside_their_state() -> None:
    plan = plan_memory(SPEC, torch.float32, 4 * 10**6, 500, 16, bytes_per_request=50_000)
    without = plan_memory(SPEC, torch.float32, 4 * 10**6, 500, 16)
    state = State(SPEC, plan.num_state_slots, plan.num_blocks, torch.float32)
    assert plan.nbytes == state.nbytes + plan.num_slots * 50_000 <= 4 * 10**6
    assert plan.num_blocks < without.num_blocks
    with pytest.raises(ValueError, match="but the state budget is"):
        plan_memory(SPEC, torch.float32, 50_000 + 224 + 8191, 16, 1, bytes_per_request=50_000)
