import random
from collections.abc import Sequence

import pytest

from services.engine.contract.errors import EngineOverloaded
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import FinishReason, TokenOutput
from services.engine.drafting.draft_depth import Acceptance, DraftingState
from services.engine.request import Request
from services.engine.sampling.sampler import SampledToken
from services.engine.scheduling.scheduled_batch import ScheduledBatch, StepResult
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from services.engine.scheduling.waiting_queue import AGEING_S
from tests.services.engine.machine import Machine, naive


def make(**limits: int) -> Scheduler:
    defaults = {"num_slots": 4, "num_blocks": 64, "block_size": 4, "max_model_len": 128, "max_batch_tokens": 16}
    return Scheduler(SchedulerConfig(**(defaults | limits)), clock=lambda: 0.0)


def request(
    name: str, num_prompt: int, num_answer: int = 8, deadline: float = float("inf"), priority: int = 0
) -> Request:
    """Return a request whose first prompt tokens differ from every other request's prompt."""
    prompt = [random.Random(name).randrange(10, 10**6) for _ in range(num_prompt)]
    params = SamplingParams(priority=priority)
    return Request(name, prompt, params, 0, num_prompt + num_answer, frozenset({0}), deadline)


def lens(batch: ScheduledBatch) -> dict[str, int]:
    return {r.id: length for r, length in batch}


def commit(scheduler: Scheduler, batch: ScheduledBatch, token: int = 9) -> list[TokenOutput]:
    results = [StepResult(tokens(token)) if batch.catches_up(i) else StepResult() for i in range(len(batch.requests))]
    return scheduler.postprocess(batch, results)


def tokens(*token_ids: int) -> tuple[SampledToken, ...]:
    return tuple(SampledToken(token_id, None) for token_id in token_ids)


def step(scheduler: Scheduler, token: int = 9) -> dict[str, int]:
    batch = scheduler.schedule()
    computed = lens(batch)
    commit(scheduler, batch, token)
    return computed


def assert_nothing_is_held(scheduler: Scheduler) -> None:
    assert not scheduler.has_work
    assert scheduler.memory.num_slots_taken == scheduler.memory.pages.num_taken == 0


def test_prompts_are_computed_in_pieces_beside_running_requests() -> None:
    scheduler = make()
    scheduler.add(request("a", 3))
    assert step(scheduler) == {"a": 3}
    scheduler.add(request("long", 40))
    assert step(scheduler) == {"a": 1, "long": 15}
    scheduler.add(request("b", 2))
    assert step(scheduler) == {"a": 1, "long": 13, "b": 2}
    assert step(scheduler) == {"a": 1, "long": 12, "b": 1}
    assert step(scheduler) == {"a": 1, "long": 1, "b": 1}


def test_prompts_are_split_only_at_multiples_of_the_scan_chunk() -> None:
    scheduler = make(chunk_align=8, max_batch_tokens=21)
    scheduler.add(request("a", 3))
    step(scheduler)
    scheduler.add(request("long", 45))
    scheduler.add(request("b", 30))
    assert [step(scheduler) for _ in range(3)] == 3 * [{"a": 1, "long": 8, "b": 8}]
    assert step(scheduler) == {"a": 1, "long": 8, "b": 6}
    assert step(scheduler) == {"a": 1, "long": 13, "b": 1}
    assert step(scheduler) == {"a": 1, "long": 1, "b": 1}


def test_outputs_count_tokens_and_end_with_a_reason() -> None:
    scheduler = make()
    scheduler.add(request("a", 3, num_answer=2))
    scheduler.add(request("b", 2))
    first = commit(scheduler, scheduler.schedule())
    assert first == [output("a", 9, None, 3, 1), output("b", 9, None, 2, 1)]
    last = commit(scheduler, scheduler.schedule(), token=0)
    assert last == [output("a", 0, FinishReason.STOP, 3, 2), output("b", 0, FinishReason.STOP, 2, 2)]
    assert_nothing_is_held(scheduler)


def output(name: str, token: int, reason: FinishReason | None, num_prompt: int, num_generated: int) -> TokenOutput:
    return TokenOutput(name, (token,), reason, num_prompt, num_generated, cache_reason="too_short")


def test_admission_waits_for_memory_in_order_of_arrival() -> None:
    scheduler = make(num_slots=3, num_blocks=10, max_batch_tokens=64)
    for name in ("a", "b", "c"):
        scheduler.add(request(name, 16))
    scheduler.schedule()
    # Each of the two running requests has 4 pages. The third request would need 4 pages, and in addition one page for
    # each running request to grow.
    assert [r.id for r in scheduler.running] == ["a", "b"]
    scheduler.abort_step()
    scheduler.abort("b")
    scheduler.schedule()
    assert [r.id for r in scheduler.running] == ["c"]


def test_the_youngest_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = make(num_blocks=6, block_size=2)
    old, young = request("old", 4), request("young", 2)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.num_preemptions == 0:
        batch = scheduler.schedule()
        if scheduler.num_preemptions == 0:
            commit(scheduler, batch)
    assert lens(batch) == {"old": 1}
    assert (young.slot, young.num_computed_tokens, list(young.block_table)) == (None, 0, [])
    generated = young.num_generated
    assert generated > 0
    commit(scheduler, batch)
    while old.slot is not None:
        step(scheduler)
    assert step(scheduler) == {"young": 2 + generated}
    assert young.num_generated == generated + 1


def test_the_waiting_queue_is_bounded() -> None:
    scheduler = make(max_waiting=2)
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 3))
    with pytest.raises(EngineOverloaded, match=r"^2 requests are waiting, which is the most this server queues\.$"):
        scheduler.add(request("c", 3))


def test_abort_frees_memory_at_once() -> None:
    scheduler = make(num_slots=1)
    for name in ("a", "b"):
        scheduler.add(request(name, 10))
    step(scheduler)
    scheduler.abort("a")
    scheduler.abort("nobody")
    assert scheduler.memory.pages.num_taken == scheduler.memory.num_slots_taken == 0
    scheduler.abort("b")
    assert_nothing_is_held(scheduler)


def test_a_passed_deadline_ends_running_and_waiting_requests() -> None:
    now = 0.0
    scheduler = Scheduler(make(num_slots=1).config, clock=lambda: now)
    scheduler.add(request("a", 3, deadline=5.0))
    scheduler.add(request("b", 3, deadline=4.0))
    assert len(commit(scheduler, scheduler.schedule())) == 1
    now = 5.0
    outputs = commit(scheduler, scheduler.schedule())
    assert [(o.request_id, o.finish_reason) for o in outputs[1:]] == [("a", "deadline"), ("b", "deadline")]
    assert_nothing_is_held(scheduler)


def test_a_failed_step_costs_only_its_own_requests() -> None:
    scheduler = make(num_slots=1)
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 3))
    scheduler.schedule()
    assert [r.id for r in scheduler.abort_step()] == ["a"]
    assert step(scheduler) == {"b": 3}


def test_limits_that_would_starve_a_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens must be at least num_slots \\+ chunk_align = 132, not 16"):
        make(chunk_align=128)
    with pytest.raises(ValueError, match=r"num_slots must be at least 1, not 0\."):
        make(num_slots=0)
    with pytest.raises(ValueError, match=r"max_draft_tokens must be at least 0, not -1\."):
        make(max_draft_tokens=-1)


@pytest.mark.parametrize("seed", range(20))
def test_random_load_always_ends_and_leaks_nothing(seed: int) -> None:
    rng = random.Random(seed)
    limits = {
        "num_blocks": rng.randint(8, 20),
        "chunk_align": rng.choice([1, 4]),
        "max_scored_tokens": rng.randint(0, 5),
    }
    scheduler = make(num_slots=3, max_waiting=1000, **limits)
    requests = [request(str(i), rng.randint(1, 24), rng.randint(1, 8)) for i in range(40)]
    for r in requests:
        r.params = SamplingParams(prompt_logprobs=rng.choice([None, None, 1]))
        scheduler.add(r)
    for _ in range(2000):
        if not scheduler.has_work:
            break
        batch = scheduler.schedule()
        assert 0 < sum(batch.lens) <= scheduler.config.max_batch_tokens
        held = [block for r in scheduler.running for block in r.block_table]
        assert len(held) == len(set(held)) == scheduler.memory.pages.num_taken
        commit(scheduler, batch)
        if rng.random() < 0.05:
            scheduler.abort(str(rng.randrange(40)))
    assert_nothing_is_held(scheduler)


# Drafts ---------------------------------------------------------------------------------------------------------------


def drafting_machine(**limits: int) -> Machine:
    scheduler = make(**({"max_draft_tokens": 3} | limits))
    scheduler.drafting = AlwaysDrafting(scheduler.config.max_draft_tokens)
    return Machine(scheduler)


class AlwaysDrafting(DraftingState):
    """An `AlwaysDrafting` state always chooses the largest allowed draft depth, regardless of the cost."""

    def depths(self, acceptances: Sequence[Acceptance], num_other_rows: int, allowed: Sequence[int]) -> list[int]:
        return [min(self.max_depth, some) for some in allowed]


def test_drafts_are_tokens_to_catch_up_with() -> None:
    machine = drafting_machine()
    a = request("a", 6, num_answer=20)
    machine.scheduler.add(a)
    first = machine.step()
    assert (first.lens, first.num_drafts, first.draft_depths) == ((6,), (0,), (3,))
    second = machine.step()
    assert (second.lens, second.num_drafts) == ((4,), (3,))
    assert a.num_computed_tokens == a.num_tokens - 1
    machine.finish()
    assert machine.answer("a") == naive(a.token_ids[:6], 20)


def test_drafts_never_go_beyond_the_last_token() -> None:
    machine = drafting_machine()
    machine.draft_accuracy = 1.0
    a = request("a", 6, num_answer=6)
    machine.scheduler.add(a)
    batches = [machine.step() for _ in range(3)]
    # The steps compute one token, then one token and three drafts, then the last token, which needs no drafts.
    assert [batch.num_drafts for batch in batches] == [(0,), (3,), (0,)]
    # If the drafts of the second step had been wrong, the third step could have used three more drafts.
    assert [batch.draft_depths for batch in batches] == [(3,), (3,), (0,)]
    assert a.num_tokens == a.max_len


def test_the_budget_counts_drafts_and_leaves_prompts_their_share() -> None:
    machine = drafting_machine(num_slots=4, chunk_align=8, max_batch_tokens=14)
    for name in ("a", "b", "c"):
        machine.scheduler.add(request(name, 2, num_answer=60))
    machine.step()
    machine.scheduler.add(request("long", 30))
    while machine.scheduler.has_work:
        batch = machine.step()
        assert sum(batch.lens) <= 14
        for r, length in batch:
            if r.id == "long" and r.num_generated == 0:
                assert length >= 6
    assert sum(machine.scheduler.drafting.accepted) > 0


def test_preemption_drops_drafts_and_keeps_tokens() -> None:
    machine = drafting_machine(num_blocks=12, num_slots=3)
    requests = [request(name, 10, num_answer=25) for name in ("a", "b", "c")]
    for r in requests:
        machine.scheduler.add(r)
    while machine.scheduler.has_work:
        machine.step()
        assert all(not r.draft_ids for r in machine.scheduler.waiting)
    assert machine.scheduler.num_preemptions > 0
    for r in requests:
        assert machine.answer(r.id) == naive(r.token_ids[:10], 25)


# Fairness -------------------------------------------------------------------------------------------------------------


def test_lower_priority_numbers_start_first_and_higher_ones_make_room_first() -> None:
    scheduler = make(num_slots=2, num_blocks=12)
    for name, priority in (("late", 1), ("soon", 0), ("last", 1), ("first", -1)):
        scheduler.add(request(name, 8, num_answer=24, priority=priority))
    step(scheduler)
    assert [r.id for r in scheduler.running] == ["first", "soon"]
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert [r.id for r in scheduler.running] == ["first"]
    assert [r.id for r in scheduler.waiting] == ["soon", "late", "last"]


def test_a_strictly_higher_priority_preempts_the_youngest_of_the_lowest() -> None:
    scheduler = make(num_slots=3)
    for name, priority in (("old", 5), ("young", 5), ("middle", 3)):
        scheduler.add(request(name, 4, num_answer=20, priority=priority))
        step(scheduler)
    scheduler.add(request("equal", 4, num_answer=20, priority=5))
    step(scheduler)
    assert scheduler.num_preemptions == 0
    scheduler.add(request("urgent", 4, num_answer=2, priority=-1))
    batch = scheduler.schedule()
    assert lens(batch) == {"middle": 1, "old": 1, "urgent": 4}
    assert [r.id for r in batch.preempted] == ["young"]
    commit(scheduler, batch)
    step(scheduler)
    assert [r.id for r in scheduler.running] == ["middle", "old"]
    assert [r.id for r in scheduler.waiting] == ["young", "equal"]
    step(scheduler)
    assert [r.id for r in scheduler.running] == ["middle", "old", "young"]
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions == 1


def test_nobody_is_preempted_unless_that_makes_enough_room() -> None:
    scheduler = make(num_slots=4, num_blocks=16, max_batch_tokens=64)
    scheduler.add(request("equal", 24, num_answer=4))
    scheduler.add(request("low", 8, num_answer=4, priority=1))
    step(scheduler)
    scheduler.add(request("large", 40, num_answer=2))
    step(scheduler)
    assert [r.id for r in scheduler.running] == ["equal", "low"]
    scheduler.abort("large")
    scheduler.add(request("fits", 28, num_answer=2))
    step(scheduler)
    assert [r.id for r in scheduler.running] == ["equal", "fits"]
    assert scheduler.num_preemptions == 1


@pytest.mark.parametrize("seed", range(10))
def test_priorities_at_random_change_no_token_and_every_preemption_has_a_newcomer(seed: int) -> None:
    rng = random.Random(seed)
    machine = drafting_machine(num_slots=3, num_checkpoint_slots=rng.choice([0, 2]), num_blocks=rng.choice([40, 200]))
    requests = [request(str(i), rng.randint(1, 30), 12, priority=rng.randint(-2, 2)) for i in range(40)]
    prompts, coming = {r.id: list(r.token_ids) for r in requests}, list(requests)
    while coming or machine.scheduler.has_work:
        if coming and (rng.random() < 0.3 or not machine.scheduler.has_work):
            machine.scheduler.add(coming.pop())
        before = set(machine.scheduler.running)
        batch = machine.step()
        for gone in batch.preempted:
            if machine.scheduler.config.num_blocks == 200:  # there are enough pages, so only a slot was lacking
                assert any(r.params.priority < gone.params.priority for r in set(batch.requests) - before)
    assert machine.scheduler.num_preemptions > 0
    assert all(machine.answer(r.id) == naive(prompts[r.id], 12) for r in requests)


def test_a_stream_of_short_requests_cannot_starve_a_long_prompt() -> None:
    scheduler = make(num_slots=4, max_batch_tokens=16, max_waiting=1000, num_blocks=200, max_model_len=500)
    for i in range(20):
        scheduler.add(request(f"before-{i}", 12, num_answer=3))
    long = request("long", 400)
    scheduler.add(long)
    num_steps = 0
    while long.num_generated == 0:
        scheduler.add(request(f"after-{num_steps}", 12, num_answer=3))
        step(scheduler)
        num_steps += 1
    # At first, 20 requests run, each with 12 tokens and 2 steps. Later at most 3 requests decode, and the long prompt
    # has half of the budget.
    assert num_steps <= 20 * 12 / 12 + 2 + 2 * 400 / 12 + 3


@pytest.mark.parametrize(("num_long", "align"), [(1, 1), (4, 64)])
def test_a_short_prompt_does_not_wait_for_long_ones_and_these_end(num_long: int, align: int) -> None:
    length = 100_000  # tokens
    sizes = {"num_blocks": 50_000, "block_size": 16, "max_model_len": 131_072}
    scheduler = make(num_slots=16, max_batch_tokens=2048, chunk_align=align, **sizes)
    long = [request(f"long-{n}", length) for n in range(num_long)]
    for each in long:
        scheduler.add(each)
    step(scheduler)
    short = request("short", 20, num_answer=2)
    scheduler.add(short)
    num_steps = 0
    while not short.num_generated:
        step(scheduler)
        num_steps += 1
    assert num_steps <= 3
    assert long[0].num_computed_tokens < 10_000
    for n in range(2 * length // 2048):  # new requests arrive in every step
        scheduler.add(request(f"after-{n}", 1500, num_answer=1))
        step(scheduler)
    assert long[0].num_generated
    while scheduler.has_work:
        step(scheduler, token=0)
    assert all(each.num_generated for each in long)


def test_the_budget_is_shared_with_no_one_of_lower_priority() -> None:
    scheduler = make(max_batch_tokens=64, max_model_len=256, num_blocks=200)
    scheduler.add(request("first", 150, priority=1))
    assert step(scheduler) == {"first": 64}
    scheduler.add(request("second", 64, priority=2))
    assert step(scheduler) == {"first": 64}
    urgent = request("urgent", 20, priority=0)
    scheduler.add(urgent)
    assert step(scheduler) == {"first": 22, "urgent": 20, "second": 22}
    assert urgent.num_generated == 1


def busy(now: list[float]) -> tuple[Scheduler, Request]:
    """Return a scheduler with two slots and five requests, and the request of low priority among the five.

    The four other requests have high priority. The request of low priority waits as long as the test adds requests of
    high priority fast enough.
    """
    config = SchedulerConfig(2, 64, 4, 128, max_batch_tokens=16, max_waiting=10_000)
    scheduler = Scheduler(config, clock=lambda: now[0])
    low = request("low", 4, num_answer=30, priority=2)
    for n in range(4):
        scheduler.add(request(f"high-{n}", 4, num_answer=10))
    scheduler.add(low)
    return scheduler, low


def test_who_waits_long_enough_starts_and_ends_under_a_load_of_higher_priority() -> None:
    now = [0.0]
    scheduler, low = busy(now)
    started_at = 0.0
    for n in range(1000):
        now[0] += 0.1
        if n % 4 == 0:
            scheduler.add(request(f"next-{n}", 4, num_answer=10))
        step(scheduler)
        started_at = started_at or (now[0] if low.num_generated else 0.0)
    assert 2 * AGEING_S <= started_at < 3 * AGEING_S + 1
    assert low.num_generated == 30
    assert scheduler.num_preemptions == 0, "a request that waited so long must not be preempted by a newcomer"


def test_nobody_is_preempted_for_what_another_gained_by_waiting() -> None:
    now = [0.0]
    scheduler = Scheduler(SchedulerConfig(1, 64, 4, 128, max_batch_tokens=16), clock=lambda: now[0])
    scheduler.add(request("first", 4, num_answer=100))
    step(scheduler)
    scheduler.add(request("equal", 4, num_answer=100))
    scheduler.add(request("low", 4, num_answer=100, priority=1))
    for _ in range(50):
        now[0] += AGEING_S / 4
        assert step(scheduler) == {"first": 1}
    scheduler.add(request("urgent", 4, num_answer=100, priority=-50))
    assert step(scheduler) == {"urgent": 4}, "waiting must not make up for a distance of 50 priorities"


def test_long_prompts_cannot_starve_those_who_generate() -> None:
    scheduler = make(num_slots=4, max_batch_tokens=16, num_blocks=500, max_model_len=900)
    short = request("short", 4, num_answer=60)
    scheduler.add(short)
    step(scheduler)
    for i in range(3):
        scheduler.add(request(f"long-{i}", 800))
    for num_steps in range(1, 50):
        assert sum(step(scheduler).values()) == 16
        assert short.num_generated == 1 + num_steps


@pytest.mark.parametrize(("align", "allowed"), [(1, 3), (4, 4)])
def test_scored_prompts_are_computed_in_small_pieces_only_beside_others(align: int, allowed: int) -> None:
    scheduler = make(max_scored_tokens=3, chunk_align=align, num_blocks=500, max_model_len=900)
    for name in ("a", "b"):
        scored = request(name, 40)
        scored.params = SamplingParams(prompt_logprobs=1)
        scheduler.add(scored)
    assert step(scheduler) == {"a": 12, "b": 4}, "they may delay each other"
    scheduler.add(request("plain", 9, num_answer=100))
    assert step(scheduler) == {"a": allowed, "plain": 9}
    for _ in range(4):
        assert step(scheduler) == {"a": allowed, "plain": 1}
    scheduler.abort("plain")
    assert sum(step(scheduler).values()) == 16


def test_retry_after_follows_from_the_measured_rate() -> None:
    now = 0.0
    scheduler = Scheduler(make(num_slots=1, max_waiting=20).config, clock=lambda: now)
    for i in range(20):
        scheduler.add(request(str(i), 4, num_answer=1))
    for i in range(10):  # each step takes 3 seconds and starts one request
        batch = scheduler.schedule()
        now += 3.0
        commit(scheduler, batch)
        scheduler.add(request(f"more-{i}", 4, num_answer=1))
    with pytest.raises(EngineOverloaded) as refused:
        scheduler.add(request("one too many", 4))
    assert refused.value.retry_after == 30  # seconds until 10 of the 20 waiting requests have started
    now += 10_000.0
    assert 1 <= scheduler.waiting.retry_after <= 60
