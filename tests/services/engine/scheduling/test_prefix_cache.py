import array
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from services.engine.contract.sampling_params import SamplingParams
from services.engine.request import Request
from services.engine.scheduling.prefix_cache import CachedPrefix, PrefixCache
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.services.engine.machine import STOP, VOCAB_SIZE, Machine, naive

TURN_END = 7


def make(**limits: int) -> Machine:
    defaults = {
        "num_slots": 8,
        "num_checkpoint_slots": 32,
        "num_blocks": 4096,
        "block_size": 16,
        "max_model_len": 8192,
        "max_batch_tokens": 2048,
        "bytes_per_slot": 100,
        "bytes_per_block": 3,
    }
    config = SchedulerConfig(**(defaults | limits), turn_end_ids=frozenset({TURN_END}))
    return Machine(Scheduler(config, clock=lambda: 0.0))


def text(name: str, length: int) -> list[int]:
    """Return `length` random tokens with the seed `name`; none of these tokens ends a turn or an answer."""
    rng = random.Random(name)
    return [rng.randrange(10, VOCAB_SIZE) for _ in range(length)]


def request(name: str, prompt: Sequence[int], num_answer: int = 8, params: SamplingParams | None = None) -> Request:
    params = params or SamplingParams()
    return Request(name, list(prompt), params, 0, len(prompt) + num_answer, frozenset({STOP}))


def ask(machine: Machine, name: str, prompt: Sequence[int], num_answer: int = 8) -> Request:
    """Run one request to its end, check its answer, and return the request."""
    asked = request(name, prompt, num_answer)
    machine.scheduler.add(asked)
    machine.finish()
    assert machine.answer(name) == naive(prompt, num_answer)
    return asked


def assert_consistent(scheduler: Scheduler) -> None:
    """Check that the counted owners of every page and slot are its real owners, and that no page or slot is lost."""
    cache, pages = scheduler.memory.cache, scheduler.memory.pages
    users = Counter(page for r in scheduler.running for page in r.block_table)
    keepers = Counter(kept.page for kept in cache.checkpoints.kept.values())
    keepers.update(c.tail_page for c in cache.checkpoints._by_key.values() if c.tail_page is not None)
    for page in range(pages.size):
        assert pages._num_users[page] == users[page]
        assert pages._num_keepers[page] == keepers[page]
    assert pages.num_taken == len(users)
    assert pages.num_idle == len(keepers - Counter(dict.fromkeys(users, 10**6)))
    assert pages.num_free + pages.num_taken + pages.num_idle == pages.size
    holders = Counter(h for c in cache.checkpoints._by_key.values() for h in c.page_hashes)
    assert {h: kept.num_checkpoints for h, kept in cache.checkpoints.kept.items()} == holders
    for asked in (*scheduler.running, *scheduler.waiting):
        hashes = asked.hash_pages(scheduler.config.block_size)
        first_free = next(
            (i for i, page_hash in enumerate(hashes) if page_hash not in cache.checkpoints.kept), len(hashes)
        )
        assert cache.checkpoints.num_kept(hashes) == first_free
        assert not set(hashes[first_free:]) & set(cache.checkpoints.kept)
    held = [r.slot for r in scheduler.running] + [
        c.slot for c in cache.checkpoints._by_key.values() if c.slot is not None
    ]
    assert len(held) == len(set(held)) == scheduler.memory.slots.num_taken
    for checkpoint in cache.checkpoints._by_key.values():
        assert checkpoint.base is None or cache.checkpoints._by_key[checkpoint.base.key] is checkpoint.base
        assert checkpoint.num_above == sum(c.base is checkpoint for c in cache.checkpoints._by_key.values())
        num_full = checkpoint.length // scheduler.config.block_size
        num_below = checkpoint.base.length // scheduler.config.block_size if checkpoint.base else 0
        assert len(checkpoint.page_hashes) == num_full - num_below
        assert checkpoint.page_hashes[-1:] in ((checkpoint.last_hash,), ())


# What is reused -------------------------------------------------------------------------------------------------------


def test_the_next_turn_starts_where_the_last_one_ended() -> None:
    machine = make()
    first = ask(machine, "first", text("first", 100))
    second = ask(machine, "second", [*first.token_ids, *text("second", 50)])
    # The last token of the first answer was sampled, but no step computed this token.
    assert (second.num_cached, second.cache_reason) == (first.num_tokens - 1, "hit")
    assert first.num_cached == 0
    assert machine.num_computed == first.num_tokens - 1 + 50 + 8


def test_prefixes_are_shared_only_between_equal_salts() -> None:
    machine, prompt = make(), text("shared", 200)
    found = []
    for n, salt in enumerate(["", "a", "b", "a", "", "b"]):
        asked = request(f"{n}", [*prompt, 10 + n], params=SamplingParams(cache_salt=salt))
        machine.scheduler.add(asked)
        machine.finish()
        assert machine.answer(f"{n}") == naive(asked.token_ids[:201], 8)
        found.append((asked.num_cached, asked.cache_reason))
        assert_consistent(machine.scheduler)
    assert found[:3] == [(0, "no_match")] * 3, "another salt's prefix was used, or its existence was reported"
    assert all(reason in ("hit", "no_checkpoint_at_boundary") for _, reason in found[3:])


def test_pages_are_shared_only_between_equal_salts_in_a_family_without_recurrent_state() -> None:
    machine = make(bytes_per_slot=0, num_checkpoint_slots=0)
    first = ask(machine, "first", text("long", 1000))
    for salt, reason in (("a", "no_match"), ("", "hit")):
        salted = request(salt, [*first.token_ids, 10], params=SamplingParams(cache_salt=salt))
        machine.scheduler.add(salted)
        machine.scheduler.schedule()
        assert salted.cache_reason == reason
        machine.scheduler.abort_step()


def test_running_requests_do_not_wait_for_the_checkpoint_of_another_salt() -> None:
    machine, prompt = make(), [*text("system", 64), TURN_END, *text("user", 64)]
    for n, salt in enumerate(["a", "b", "a"]):
        machine.scheduler.add(request(f"{n}", [*prompt, 10 + n], params=SamplingParams(cache_salt=salt)))
    batch = machine.step()
    assert [r.id for r in batch.requests] == ["0", "1"]
    machine.finish()


def test_a_salt_is_no_hash_of_tokens() -> None:
    """Try the salt whose bytes are the first page of another request, so that its hash might equal the page's hash."""
    page = [n + 97 for n in range(16)]  # small enough that the bytes of these ids are valid text
    plain = request("plain", [*page, *text("rest", 32)])
    salt = array.array("i", page).tobytes().decode()
    assert len(salt) <= 128
    salted = request("salted", text("rest", 32), params=SamplingParams(cache_salt=salt))
    assert not set(plain.hash_pages(16)) & set(salted.hash_pages(16))


def test_a_page_that_is_not_full_is_copied_and_never_shared() -> None:
    machine = make(num_slots=3)
    first = ask(machine, "first", text("first", 100))
    for name in ("a", "b", "c"):  # three requests in a batch, which continue the same page
        machine.scheduler.add(request(name, [*first.token_ids, *text(name, 20)]))
    batch = machine.step()
    sources, targets = zip(*batch.page_copies, strict=True)
    assert len(set(sources)) == 1
    assert len(set(targets)) == 3
    machine.finish()
    for name in ("a", "b", "c"):
        assert machine.answer(name) == naive([*first.token_ids, *text(name, 20)], 8)


def test_a_branch_leaves_a_checkpoint_for_those_who_follow() -> None:
    machine = make()
    shared = text("shared", 200)
    first, second, third = (ask(machine, name, [*shared, *text(name, 30)]) for name in ("a", "b", "c"))
    assert (first.num_cached, first.cache_reason) == (0, "no_match")
    assert (second.num_cached, second.cache_reason) == (0, "no_checkpoint_at_boundary")
    assert (third.num_cached, third.cache_reason) == (192, "hit")


def test_requests_wait_for_a_checkpoint_that_is_on_its_way() -> None:
    machine = make()
    shared = text("shared", 1000)
    requests = [request(str(i), [*shared, *text(str(i), 50)]) for i in range(8)]
    for each in requests:
        machine.scheduler.add(each)
    machine.finish()
    assert [r.num_cached for r in requests] == [0, 0, *[992] * 6]
    assert machine.num_computed < 3 * 1050 + 6 * 70


def test_turn_ends_are_checkpoints() -> None:
    machine = make()
    system, question = [*text("system", 99), TURN_END], [*text("question", 60), TURN_END, 8, 9]
    ask(machine, "first", [*system, *question])
    other = ask(machine, "other", [*system, *text("other", 40)])
    assert other.num_cached == 100
    # The chat template leaves the reasoning out of earlier answers, so the new prompt does not hold the old answer.
    again = ask(machine, "again", [*system, *text("question", 60), TURN_END, 8, *text("rewritten", 50)])
    assert again.num_cached == 161


def test_long_prompts_leave_checkpoints_every_so_often() -> None:
    machine = make(checkpoint_interval=256)
    prompt = text("long", 1000)
    ask(machine, "first", prompt)
    assert ask(machine, "fork", [*prompt[:800], *text("fork", 100)]).num_cached == 768


def test_a_checkpoint_records_only_the_pages_that_the_one_before_lacks() -> None:
    """So the work for a long prompt's many checkpoints grows with its length, not with the square of its length."""
    machine = make()
    long = ask(machine, "long", text("long", 7000))
    checkpoints = list(machine.scheduler.memory.cache.checkpoints)
    assert len(checkpoints) > 6
    assert sum(len(checkpoint.page_hashes) for checkpoint in checkpoints) == (long.num_tokens - 1) // 16
    ask(machine, "branch", [*long.token_ids[:3000], *text("branch", 2000)])
    assert_consistent(machine.scheduler)


def test_positions_are_rounded_down_to_where_a_scan_may_be_cut() -> None:
    machine = make(checkpoint_align=128, chunk_align=128)
    shared = text("shared", 500)
    for name in ("a", "b"):
        ask(machine, name, [*shared, TURN_END, *text(name, 30)])
    assert ask(machine, "c", [*shared, TURN_END, *text("c", 30)]).num_cached == 384


def test_a_family_without_recurrent_state_starts_at_any_page() -> None:
    machine = make(bytes_per_slot=0, num_checkpoint_slots=0)
    prompt = text("long", 1000)
    ask(machine, "first", prompt)
    fork = request("fork", [*prompt[:807], *text("fork", 100)])
    machine.scheduler.add(fork)
    machine.scheduler.schedule()
    assert (fork.num_cached, fork.cache_reason) == (800, "hit")
    assert machine.scheduler.memory.cache.checkpoints.num_slots == 0


def test_the_only_slot_is_handed_on_without_a_copy() -> None:
    machine = make(num_slots=1, num_checkpoint_slots=0)
    first = ask(machine, "first", text("first", 100))
    second = request("second", [*first.token_ids, *text("second", 50)])
    machine.scheduler.add(second)
    assert not machine.step().slot_copies
    machine.finish()
    assert second.num_cached == first.num_tokens - 1
    assert machine.answer("second") == naive([*first.token_ids, *text("second", 50)], 8)


# The reason why a prompt cannot reuse more ----------------------------------------------------------------------------


def test_every_request_says_why() -> None:
    machine = make()
    assert ask(machine, "a", text("a", 20)).cache_reason == "too_short"
    assert ask(machine, "b", text("b", 200)).cache_reason == "no_match"
    assert ask(machine, "c", [*text("b", 200)[:150], *text("c", 50)]).cache_reason == "no_checkpoint_at_boundary"
    assert ask(machine, "d", [*text("b", 200)[:150], *text("d", 50)]).cache_reason == "hit"
    probed = request("e", text("b", 200), params=SamplingParams(prompt_logprobs=1))
    machine.scheduler.add(probed)
    machine.finish()
    assert (probed.cache_reason, probed.num_cached) == ("prompt_logprobs", 0)
    off = make(has_prefix_cache=False)
    assert ask(off, "a", text("a", 100)).cache_reason == "disabled"
    assert ask(off, "b", text("a", 100)).cache_reason == "disabled"
    assert len(off.scheduler.memory.cache.checkpoints) == 0
    assert machine.scheduler.memory.cache.counts.by_reason == {
        "too_short": 1,
        "no_match": 1,
        "no_checkpoint_at_boundary": 1,
        "hit": 1,
        "prompt_logprobs": 1,
    }


def test_a_checkpoint_between_two_pages_is_the_base_of_its_own_continuations_alone() -> None:
    machine, shared = make(), text("shared", 40)
    ask(machine, "other", [*shared, *text("other", 60)], num_answer=1)
    ask(machine, "longer", [*shared, *text("middle", 4), *text("longer", 60)], num_answer=1)
    before = {id(c) for c in machine.scheduler.memory.cache.checkpoints._by_key.values()}
    ask(machine, "middle", [*shared, *text("middle", 4)], num_answer=1)
    checkpoints = list(machine.scheduler.memory.cache.checkpoints._by_key.values())
    [new] = [c for c in checkpoints if id(c) not in before and c.length == 44]
    assert [c.length for c in checkpoints if c.base is new] == [104]
    assert_consistent(machine.scheduler)


def test_a_request_that_cannot_start_is_not_looked_up_again_until_the_cache_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, looked_up = make(num_slots=2, num_blocks=16), list[str]()
    look_up = PrefixCache._look_up

    def noting(self: PrefixCache, asked: Request) -> CachedPrefix:
        looked_up.append(asked.id)
        return look_up(self, asked)

    monkeypatch.setattr(PrefixCache, "_look_up", noting)
    machine.scheduler.add(request("running", text("running", 100), 20))
    machine.scheduler.add(request("blocked", text("blocked", 150), 2))
    machine.finish()
    assert looked_up.count("running") == 1
    assert 1 <= looked_up.count("blocked") <= 3


def test_an_evicted_prefix_is_named() -> None:
    machine = make(num_slots=1, num_checkpoint_slots=1)
    first = ask(machine, "first", text("first", 100))
    ask(machine, "second", text("second", 100))
    ask(machine, "third", text("third", 100))
    assert machine.scheduler.memory.cache.checkpoints.num_evictions > 0
    assert ask(machine, "again", [*first.token_ids, *text("again", 20)]).cache_reason == "evicted"


def test_the_reason_is_that_of_the_first_start() -> None:
    machine = make(num_blocks=24, num_slots=2)
    for name in ("old", "young"):
        machine.scheduler.add(request(name, text(name, 150), num_answer=100))
    machine.finish()
    assert machine.scheduler.num_preemptions > 0
    outputs = [output for some in machine.outputs.values() for output in some]
    assert {output.cache_reason for output in outputs} == {"no_match"}
    assert {output.num_cached for output in outputs} == {0}
    assert machine.answer("young") == naive(text("young", 150), 100)


# Which checkpoints are evicted first ----------------------------------------------------------------------------------


def test_what_is_used_often_and_saves_much_outlives_the_rest() -> None:
    machine = make(num_slots=1, num_checkpoint_slots=4)
    shared = text("shared", 1000)
    for i in range(40):
        ask(machine, f"used-{i}", [*shared, *text(f"used-{i}", 20)])
        ask(machine, f"once-{i}", text(f"once-{i}", 300))
    reasons = Counter(outputs[0].cache_reason for name, outputs in machine.outputs.items() if name.startswith("used"))
    assert reasons["hit"] == 38


def test_what_nobody_uses_any_more_goes_in_the_end() -> None:
    machine = make(num_slots=1, num_checkpoint_slots=4)
    shared = text("shared", 1000)
    for i in range(10):
        ask(machine, f"used-{i}", [*shared, *text(f"used-{i}", 20)])
    for i in range(300):
        ask(machine, f"once-{i}", text(f"once-{i}", 300))
    assert ask(machine, "late", [*shared, *text("late", 20)]).cache_reason == "evicted"


def test_running_requests_win_over_cached_ones() -> None:
    machine = make(num_blocks=64, num_slots=2, num_checkpoint_slots=8)
    for i in range(6):
        ask(machine, str(i), text(str(i), 100))
    assert machine.scheduler.memory.pages.num_idle > 32
    for name in ("a", "b"):
        machine.scheduler.add(request(name, text(name, 400)))
    batch = machine.step()
    assert len(batch.requests) == 2
    machine.finish()
    assert machine.scheduler.num_preemptions == 0
    assert_consistent(machine.scheduler)


def test_a_failed_step_leaves_no_checkpoint_that_was_never_copied() -> None:
    machine = make(checkpoint_interval=64)
    machine.scheduler.add(request("a", text("a", 200)))
    machine.step()
    batch = machine.scheduler.schedule()
    assert batch.slot_copies
    machine.scheduler.abort_step()
    assert len(machine.scheduler.memory.cache.checkpoints) == 0
    assert_consistent(machine.scheduler)


# Four patterns of prompts: at least 50 of 64 requests hit the prefix cache ------------------------------------------


def shared_prefix(length: int) -> list[list[int]]:
    return [[*text("shared", length), *text(str(i), 30 + i)] for i in range(64)]


def short_prompts() -> list[list[int]]:
    return [[*text("shared", 300), *text(str(i), 20 + 3 * i)] for i in range(64)]


PATTERNS: dict[str, Callable[[], list[list[int]]]] = {
    "shared 1000": lambda: shared_prefix(1000),
    "shifted by 100": lambda: shared_prefix(1100),
    "under 528": short_prompts,
}


@pytest.mark.parametrize("align", [1, 64, 128])
@pytest.mark.parametrize("concurrency", [1, 8, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_shared_prefixes_hit(pattern: str, concurrency: int, align: int) -> None:
    machine = make(num_slots=min(concurrency, 16), chunk_align=align, checkpoint_align=align)
    prompts = PATTERNS[pattern]()
    waiting = [request(str(i), prompt, num_answer=4) for i, prompt in enumerate(prompts)]
    open_requests: list[Request] = []
    while waiting or machine.scheduler.has_work:
        while waiting and len(machine.scheduler.running) + len(machine.scheduler.waiting) < concurrency:
            open_requests.append(waiting.pop(0))
            machine.scheduler.add(open_requests[-1])
        machine.step()
    assert sum(r.num_cached > 0 for r in open_requests) >= 60
    assert all(machine.answer(str(i)) == naive(prompt, 4) for i, prompt in enumerate(prompts))
    assert_consistent(machine.scheduler)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_conversations_hit(concurrency: int) -> None:
    machine = make()
    system, histories, asked = [*text("system", 120), TURN_END], [list[int]() for _ in range(8)], list[Request]()
    for turn in range(8):
        for first in range(0, 8, concurrency):
            for i in range(first, first + concurrency):
                user = [*text(f"{i} {turn}", 25), TURN_END, 8, 9]
                asked.append(request(f"{i} {turn}", [*system, *histories[i], *user], num_answer=20))
                machine.scheduler.add(asked[-1])
            machine.finish()
            for r in asked[-concurrency:]:
                histories[int(r.id[0])] = r.token_ids[len(system) :]
    assert sum(r.num_cached > 0 for r in asked) >= 63
    reused = sum(r.num_cached for r in asked) / sum(r.num_prompt_tokens for r in asked)
    assert reused > 0.8


# Random requests in a random order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_per_slot", [0, 100])
@pytest.mark.parametrize("seed", range(12))
def test_random_load_reuses_only_true_prefixes_and_leaks_nothing(seed: int, bytes_per_slot: int) -> None:
    """Run random requests; the machine fails if a request starts from a state or from pages of other tokens."""
    rng = random.Random(seed)
    align = rng.choice([1, 8])
    machine = make(
        num_slots=rng.randint(1, 5),
        num_checkpoint_slots=rng.choice([0, 1, 3, 10]) if bytes_per_slot else 0,
        num_blocks=rng.randint(40, 120),
        block_size=4,
        max_model_len=160,
        max_batch_tokens=rng.randint(16, 64),
        chunk_align=align,
        checkpoint_align=align,
        checkpoint_interval=rng.choice([16, 50]),
        bytes_per_slot=bytes_per_slot,
        max_draft_tokens=rng.choice([0, 3]),
    )
    if not bytes_per_slot:
        machine = Stateless(machine.scheduler)
    scheduler, asked, stems = machine.scheduler, dict[str, Request](), [text(f"stem {seed}", 60)]
    for i in range(150):
        stem = rng.choice(stems)
        prompt = [*stem[: rng.randint(1, len(stem))], *text(str(i), rng.randint(0, 30))]
        if rng.random() < 0.3:
            prompt.insert(rng.randrange(len(prompt)), TURN_END)
        params = SamplingParams(prompt_logprobs=1 if rng.random() < 0.05 else None, priority=rng.randint(0, 1))
        asked[str(i)] = request(str(i), prompt, rng.randint(1, 30), params)
        scheduler.add(asked[str(i)])
        for _ in range(rng.randint(0, 8)):
            event = rng.random()
            if event < 0.04:
                scheduler.abort(str(rng.randrange(i + 1)))
            elif event < 0.06 and scheduler.has_work:
                batch = scheduler.schedule()
                if rng.random() < 0.5:
                    machine.run(batch)
                scheduler.abort_step()
            elif scheduler.has_work:
                machine.step()
            assert_consistent(scheduler)
        if rng.random() < 0.5:
            stems.append(asked[rng.choice(list(asked))].token_ids[:100])
    machine.finish()
    assert_consistent(scheduler)
    assert scheduler.memory.num_slots_taken == scheduler.memory.pages.num_taken == 0
    ended = [name for name, outputs in machine.outputs.items() if outputs[-1].finish_reason]
    assert len(ended) > 75
    for name in ended:
        r = asked[name]
        assert machine.answer(name) == naive(r.token_ids[: r.num_prompt_tokens], r.max_len - r.num_prompt_tokens)
    if not bytes_per_slot or scheduler.config.num_checkpoint_slots >= 3:
        assert sum(r.num_cached > 0 for r in asked.values()) > 10


class Stateless(Machine):
    """A `Stateless` machine runs batches as for a model that has KV pages but no recurrent state."""

    def _check_state(self, request: Request) -> None:
        assert request.slot is not None
        self.slots[request.slot] = request.token_ids[: request.num_computed_tokens]
        super()._check_state(request)
