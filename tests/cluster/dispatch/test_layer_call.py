"""These tests drive the state machine of a call in single situations, and then with random failures by seed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from cluster.dispatch.call_policy import CallPolicy
from cluster.dispatch.shard_health import LinkState, ReplyTiming
from cluster.dispatch.shard_request import RefusalCode, ShardRequest
from cluster.topology import Homes
from tests.cluster.dispatch.calls_world import NUM_EXPERTS, POLICY, TOP_K, World, hit_late, on, shards_of


def test_every_pick_goes_to_a_home_and_counts_once() -> None:
    world = World(tuple((f"s{e % 3}",) for e in range(NUM_EXPERTS)))
    call, requests = world.start([0, 1, 2, 5, 4, 3])
    assert shards_of(requests) == ["s0", "s1", "s2"]
    for request in requests:
        assert not call.is_done
        assert world.answer(call, request) == [request.id]
    assert call.is_done
    assert world.is_exact(call)


def test_many_rows_travel_in_several_messages() -> None:
    world = World(on("a"))
    call, requests = world.start([0, 1, 2] * 10, max_rows=4)
    assert [request.num_rows for request in requests] == [4, 4, 2]
    for request in reversed(requests):
        world.answer(call, request)
    assert world.is_exact(call)


def test_no_picks_need_nobody() -> None:
    call, requests = World(on("a")).start([])
    assert call.is_done
    assert not requests


def test_a_second_answer_counts_nothing() -> None:
    world = World(on("a"))
    call, [request] = world.start([0, 1, 2])
    assert world.answer(call, request)
    assert not world.answer(call, request)
    assert world.is_exact(call)


@pytest.mark.parametrize("first_wins", [True, False])
def test_of_two_homes_with_the_same_picks_the_first_answer_counts(first_wins: bool) -> None:
    world = World(on("a", "b"))
    call, [first] = world.start([0, 1, 2])
    assert not world.tick(call, first.late_after_s / 2)
    [second] = hit_late(world, call, first)
    assert {first.shard_id, second.shard_id} == {"a", "b"}
    winner, loser = (first, second) if first_wins else (second, first)
    assert world.answer(call, winner)
    assert call.is_done
    assert not world.answer(call, loser)
    assert world.is_exact(call)
    assert (world.fleet.traffic.num_hedged, world.fleet.traffic.num_hedges_won) == (1, not first_wins)


def test_a_hedge_in_several_messages_counts_when_all_of_it_has_come() -> None:
    world = World(tuple(("a", "b" if e % 2 else "c") for e in range(NUM_EXPERTS)))
    world.healths["b"].is_draining = world.healths["c"].is_draining = True  # so that all picks go to shard a
    world.fleet.is_changed = True
    call, [first] = world.start([0, 1, 2])
    assert first.shard_id == "a"
    world.healths["b"].is_draining = world.healths["c"].is_draining = False
    world.fleet.is_changed = True
    halves = hit_late(world, call, first)
    assert shards_of(halves) == ["b", "c"]
    assert world.answer(call, halves[0]) == []
    assert sorted(world.answer(call, halves[1])) == sorted(half.id for half in halves)
    assert not world.answer(call, first)
    assert world.is_exact(call)


def test_half_a_hedge_counts_nothing_where_the_first_home_answers() -> None:
    world = World(tuple(("a", "b" if e % 2 else "c") for e in range(NUM_EXPERTS)))
    world.healths["a"].overhead_us = 1.0
    world.link("b", LinkState.DOWN)
    world.link("c", LinkState.DOWN)
    call, [first] = world.start([0, 1, 2])
    world.link("b", LinkState.UP)
    world.link("c", LinkState.UP)
    halves = hit_late(world, call, first)
    assert world.answer(call, halves[0]) == []
    assert world.answer(call, first) == [first.id]
    assert world.answer(call, halves[1]) == []
    assert world.is_exact(call)


def test_where_half_a_hedge_is_refused_the_other_half_counts_nothing() -> None:
    world = World(tuple(("a", "b" if e % 2 else "c") for e in range(NUM_EXPERTS)))
    world.link("b", LinkState.DOWN)
    world.link("c", LinkState.DOWN)
    call, [first] = world.start([0, 1, 2])
    world.link("b", LinkState.UP)
    world.link("c", LinkState.UP)
    halves = hit_late(world, call, first)
    assert world.refuse(call, halves[0], RefusalCode.NOT_HOSTED) == []
    assert world.answer(call, halves[1]) == []
    assert world.answer(call, first) == [first.id]
    assert world.is_exact(call)


@pytest.mark.parametrize("code", [code for code in RefusalCode if code is not RefusalCode.BAD_SHAPE])
def test_what_is_refused_goes_to_another_home(code: RefusalCode) -> None:
    world = World(on("a", "b"))
    call, [first] = world.start([0, 1, 2])
    [second] = world.refuse(call, first, code)
    assert second.shard_id != first.shard_id
    world.answer(call, second)
    assert world.is_exact(call)
    assert world.fleet.traffic.refusals == {code: 1}


def test_a_shard_of_another_model_ends_the_call() -> None:
    world = World(on("a", "b"))
    call, [first] = world.start([0, 1, 2])
    assert not world.refuse(call, first, RefusalCode.BAD_SHAPE)
    assert call.is_done
    assert call.failure == f"Shard {first.shard_id} does not serve this model: No."


def test_errors_end_the_call_after_max_tries() -> None:
    world = World(on("a", "b"), CallPolicy(max_tries=3))
    call, requests = world.start([0, 1, 2])
    while not call.is_done:
        requests = [again for request in requests for again in world.refuse(call, request, RefusalCode.FAILED)]
        requests = requests or world.tick(call, 1.0)
    assert call.failure is not None
    assert "in max_tries = 3 tries; shard" in call.failure
    assert world.fleet.traffic.refusals == {"FAILED": 3}


def test_a_storm_of_refusals_is_answered_with_longer_and_longer_pauses() -> None:
    world = World(on("a", "b"), replace(POLICY, heal_timeout_s=5.0))
    call, requests = world.start([0, 1, 2])
    started_at, num_asked = world.now, len(requests)
    while not call.is_done:
        requests = [again for request in requests for again in world.refuse(call, request, RefusalCode.NOT_HOSTED)]
        num_asked += len(requests)
        if not requests and not call.is_done:
            assert call.wake_at > world.now
            requests = world.tick(call, call.wake_at - world.now)
            num_asked += len(requests)
    assert call.failure is not None
    assert "experts [0, 1, 2] had no live home for heal_timeout_s = 5.0; shard" in call.failure
    assert 5.0 <= world.now - started_at < 5.6
    assert num_asked < 40


def test_a_busy_shard_is_asked_again_until_the_calls_deadline() -> None:
    world = World(on("a"), replace(POLICY, timeout_s=1.0, heal_timeout_s=60.0))
    call, requests = world.start([0, 1, 2])
    started_at = world.now
    while not call.is_done:
        requests = [again for request in requests for again in world.refuse(call, request, RefusalCode.OVERLOADED)]
        requests = requests or world.tick(call, call.wake_at - world.now)
    assert "within timeout_s = 1.0" in str(call.failure)
    assert world.now - started_at < 1.1


def test_what_was_lost_or_corrupt_goes_to_another_home_and_the_shard_rests() -> None:
    for fault in (World.lose, World.corrupt):
        world = World(on("a", "b"))
        call, [first] = world.start([0, 1, 2])
        [second] = fault(world, call, first)
        assert second.shard_id != first.shard_id
        assert world.fleet.circuits(world.now) == {first.shard_id: "open", second.shard_id: "closed"}
        assert not world.answer(call, first)  # the reply comes after the request was given up
        world.answer(call, second)
        assert world.is_exact(call)
    assert world.fleet.traffic.num_corrupt == 1


def test_without_a_live_home_the_call_waits_and_goes_on_when_one_comes_up() -> None:
    world = World(on("a"))
    world.link("a", LinkState.DOWN)
    call, requests = world.start([0, 1, 2])
    assert not requests
    assert not call.is_done
    num_ticks = 0
    while world.now < 103.0:
        num_ticks += 1
        assert not world.tick(call, call.wake_at - world.now)
    assert num_ticks < 20
    world.link("a", LinkState.UP)
    [request] = world.sent(call.on_change(world.now))
    world.answer(call, request)
    assert world.is_exact(call)
    assert world.fleet.traffic.num_heals == 1


def test_the_time_without_a_home_does_not_count_towards_the_calls() -> None:
    world = World(on("a"), CallPolicy(timeout_s=1.0, heal_timeout_s=5.0))
    world.link("a", LinkState.DOWN)
    call, _ = world.start([0, 1, 2])
    while world.now < 104.0:
        assert not world.tick(call, call.wake_at - world.now)
    world.link("a", LinkState.UP)
    [request] = world.sent(call.on_change(world.now))
    assert not world.tick(call, 0.9)
    assert not call.is_done
    world.tick(call, 0.2)
    assert "within timeout_s = 1.0: the shards ['a'] have not answered" in str(call.failure)
    assert not world.answer(call, request)


def test_only_the_picks_without_a_home_wait() -> None:
    world = World(tuple(("a" if e % 2 else "b",) for e in range(NUM_EXPERTS)))
    world.link("a", LinkState.DOWN)
    call, [request] = world.start([0, 1, 2])
    assert request.shard_id == "b"
    world.answer(call, request)
    assert world.counts == Counter([0, 2])
    world.place(on("b"))
    [rest] = world.sent(call.on_change(world.now))
    world.answer(call, rest)
    assert world.is_exact(call)


def test_what_a_silent_shard_owes_goes_to_the_homes_of_a_new_placement() -> None:
    world = World(on("a"))
    call, _ = world.start([0, 1, 2])
    assert not world.tick(call, 2.0)
    world.place(on("b"))
    [again] = world.sent(call.on_change(world.now))
    assert again.shard_id == "b"
    world.answer(call, again)
    assert world.is_exact(call)


def test_hedges_have_a_budget() -> None:
    world = World(on("a", "b"), replace(POLICY, hedge_share=0.03, hedge_burst=2.0))
    for _ in range(500):
        call, [request] = world.start([0, 1, 2])
        hedge = hit_late(world, call, request)
        for one in [*hedge, request]:
            world.answer(call, one)
        world.now += 60.0  # longer than any circuit stays open
        world.healths[request.shard_id].succeed()
    traffic = world.fleet.traffic
    assert 2 + 0.03 * 500 - 2 <= traffic.num_hedged <= 2 + 0.03 * 500
    assert traffic.num_hedges_denied > 100


def test_a_stalled_shard_is_passed_over_even_without_a_budget() -> None:
    world = World(on("a", "b"), replace(POLICY, hedge_burst=0.0))
    call, [first] = world.start([0, 1, 2])
    assert not hit_late(world, call, first)
    [second] = world.tick(call, first.stalled_after_s)
    world.answer(call, second)
    assert world.is_exact(call)
    assert (world.fleet.traffic.num_hedged, world.fleet.traffic.num_stalled) == (0, 1)
    assert world.fleet.circuits(world.now)[first.shard_id] == "open"


@dataclass(order=True)
class Event:
    at: float
    order: int
    what: str = field(compare=False)
    request_id: int = field(compare=False, default=0)


def run_by_seed(seed: int) -> None:
    """Run three calls with the failures that `seed` chooses, and check that each pick is summed exactly once.

    The network loses, delays, repeats and reorders messages; shards refuse, hang and come back; placements change.
    """
    chance = random.Random(seed)
    ids = [f"s{i}" for i in range(chance.randint(1, 5))]

    def random_homes() -> Homes:
        return tuple(tuple(chance.sample(ids, min(len(ids), chance.randint(1, 3)))) for _ in range(NUM_EXPERTS))

    policy = CallPolicy(timeout_s=60.0, heal_timeout_s=60.0, max_tries=1000, hedge_burst=chance.choice([0.0, 8.0]))
    world = World(random_homes(), policy)
    troubles = chance.uniform(0.0, 0.6)
    events: list[Event] = []

    def post(requests: list[ShardRequest]) -> None:
        for request in world.sent(requests):
            roll = chance.random() / max(troubles, 1e-9)
            delay = chance.choice([0.0005, 0.002, 0.04, 0.8]) * chance.random()
            kinds = ["refuse", "lose", "corrupt", "silent", "twice"] if roll < 1 else ["reply"]
            kind = chance.choice(kinds)
            for _ in range(2 if kind == "twice" else 1):
                events.append(Event(world.now + delay, len(world.requests), kind, request.id))
                delay *= 1.5
            if kind == "silent":  # a hung stream is lost after a while
                events[-1] = Event(world.now + 3.0, len(world.requests), "lose", request.id)

    for _ in range(3):
        world.counts.clear()
        num_rows = chance.randint(1, 6)
        experts = [e for _ in range(num_rows) for e in chance.sample(range(NUM_EXPERTS), TOP_K)]
        call, requests = world.start(experts, max_rows=chance.randint(1, 4))
        post(requests)
        while not call.is_done:
            if world.now > call.started_at + 20.0:  # no more failures, so that the call can succeed
                troubles = 0.0
                for id in ids:
                    world.link(id, LinkState.UP)
            elif chance.random() < 0.1:
                if chance.random() < 0.5:
                    world.place(random_homes())
                else:
                    world.link(chance.choice(ids), chance.choice([LinkState.UP, LinkState.DOWN, LinkState.UP]))
                post(call.on_change(world.now))
            events.sort()
            if not events or events[0].at > call.wake_at:
                world.now = max(world.now, call.wake_at)
                post(call.on_tick(world.now))
                troubles *= 0.9
            else:
                event = events.pop(0)
                world.now, request = max(world.now, event.at), world.requests[event.request_id]
                if event.what in ("reply", "twice"):
                    assert (
                        not world.answer(call, request, ReplyTiming(0, 50, chance.randint(0, 3)))
                        or not request.is_beaten
                    )
                elif event.what == "refuse":
                    code = chance.choice([code for code in RefusalCode if code is not RefusalCode.BAD_SHAPE])
                    post(call.on_refusal(request.id, code, "No.", world.now))
                    world.healths[request.shard_id].is_draining = False
                elif event.what == "lose":
                    post(call.on_lost(request.id, world.now))
                else:
                    post(call.on_corrupt(request.id, "It was changed.", world.now))
        assert world.is_exact(call), (call.failure, world.counts)
    traffic, num_asked = world.fleet.traffic, len(world.requests)
    assert traffic.num_hedged <= policy.hedge_burst + policy.hedge_share * num_asked


@pytest.mark.parametrize("first_seed", range(0, 1000, 100))
def test_each_pick_counts_once_whatever_happens(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        try:
            run_by_seed(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
