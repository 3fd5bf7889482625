"""The state machine of a call, driven by hand and by seed; sums are sets of picks, so that none can count twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cluster.call_policy import CallPolicy
from cluster.calls import Ask, LayerCall, Refusal
from cluster.fleet import Fleet, FleetView
from cluster.health import Circuit, Link, ShardHealth, Timing, Work
from cluster.topology import Homes, Pace, Placement

TOP_K, NUM_EXPERTS = 3, 12
QUICK = Timing(0, 100, 0)
POLICY = CallPolicy(timeout_s=10.0, heal_timeout_s=5.0)


@dataclass
class World:
    """A fleet, and a clock that only the test moves; picks that count are counted."""

    homes: Homes
    policy: CallPolicy = POLICY
    standby: Homes | None = None
    now: float = 100.0
    epoch: int = 1
    mib: float = 0.01  # so small that three experts are worth no second message
    counts: Counter[int] = field(default_factory=Counter)
    asks: dict[int, Ask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.policy, {0: self.mib})
        self.healths: dict[str, ShardHealth] = {}
        self.place(self.homes, self.standby)

    def place(self, homes: Homes, standby: Homes | None = None) -> None:
        placement = Placement(self.epoch, {0: homes}, {0: 0}, standby={0: standby} if standby else {})
        for id in placement.shard_ids:
            self.healths.setdefault(id, ShardHealth(id, self.policy, link=Link.UP))
        self.fleet.adopt(FleetView(placement, self.healths, before=self.fleet.view), self.now)
        self.epoch += 1

    def link(self, shard_id: str, link: Link) -> None:
        self.healths[shard_id].link = link
        self.fleet.is_changed = True

    def start(self, experts: Sequence[int], max_rows: int = 100) -> tuple[LayerCall, list[Ask]]:
        call = LayerCall(self.fleet, 0, np.array(experts, dtype=np.int64), TOP_K, max_rows, self.now)
        return call, self.sent(call.start(self.now))

    def sent(self, asks: list[Ask]) -> list[Ask]:
        self.asks |= {ask.id: ask for ask in asks}
        return asks

    def answer(self, call: LayerCall, ask: Ask, timing: Timing = QUICK) -> list[int]:
        counting = call.on_reply(ask.id, timing, self.now)
        for id in counting:
            self.counts.update(self.asks[id].picks.tolist())
        return counting

    def tick(self, call: LayerCall, seconds: float) -> list[Ask]:
        self.now += seconds
        return self.sent(call.on_tick(self.now))

    def refuse(self, call: LayerCall, ask: Ask, code: Refusal) -> list[Ask]:
        return self.sent(call.on_refusal(ask.id, code, "No.", self.now))

    def lose(self, call: LayerCall, ask: Ask) -> list[Ask]:
        return self.sent(call.on_lost(ask.id, self.now))

    def corrupt(self, call: LayerCall, ask: Ask) -> list[Ask]:
        return self.sent(call.on_corrupt(ask.id, "It was changed.", self.now))

    def is_exact(self, call: LayerCall) -> bool:
        return call.failure is None and self.counts == Counter(range(len(call.expert_P)))


def on(*shard_ids: str) -> Homes:
    """Every expert has these homes."""
    return (shard_ids,) * NUM_EXPERTS


def shards_of(asks: Sequence[Ask]) -> list[str]:
    return sorted(ask.shard_id for ask in asks)


def hit_late(world: World, call: LayerCall, ask: Ask) -> list[Ask]:
    """Lets the time pass in which its shard should have answered."""
    return world.tick(call, ask.late_after_s + 1e-6)


def test_every_pick_goes_to_a_home_and_counts_once() -> None:
    world = World(tuple((f"s{e % 3}",) for e in range(NUM_EXPERTS)))
    call, asks = world.start([0, 1, 2, 5, 4, 3])
    assert shards_of(asks) == ["s0", "s1", "s2"]
    for ask in asks:
        assert not call.is_done
        assert world.answer(call, ask) == [ask.id]
    assert call.is_done
    assert world.is_exact(call)


def test_many_rows_travel_in_several_messages() -> None:
    world = World(on("a"))
    call, asks = world.start([0, 1, 2] * 10, max_rows=4)
    assert [ask.num_rows for ask in asks] == [4, 4, 2]
    for ask in reversed(asks):
        world.answer(call, ask)
    assert world.is_exact(call)


def test_no_picks_need_nobody() -> None:
    call, asks = World(on("a")).start([])
    assert call.is_done
    assert not asks


def test_a_second_answer_counts_nothing() -> None:
    world = World(on("a"))
    call, [ask] = world.start([0, 1, 2])
    assert world.answer(call, ask)
    assert not world.answer(call, ask)
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
    world.healths["b"].is_draining = world.healths["c"].is_draining = True  # so that a gets all
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
    world.link("b", Link.DOWN)
    world.link("c", Link.DOWN)
    call, [first] = world.start([0, 1, 2])
    world.link("b", Link.UP)
    world.link("c", Link.UP)
    halves = hit_late(world, call, first)
    assert world.answer(call, halves[0]) == []
    assert world.answer(call, first) == [first.id]
    assert world.answer(call, halves[1]) == []
    assert world.is_exact(call)


def test_where_half_a_hedge_is_refused_the_other_half_counts_nothing() -> None:
    world = World(tuple(("a", "b" if e % 2 else "c") for e in range(NUM_EXPERTS)))
    world.link("b", Link.DOWN)
    world.link("c", Link.DOWN)
    call, [first] = world.start([0, 1, 2])
    world.link("b", Link.UP)
    world.link("c", Link.UP)
    halves = hit_late(world, call, first)
    assert world.refuse(call, halves[0], Refusal.NOT_HOSTED) == []
    assert world.answer(call, halves[1]) == []
    assert world.answer(call, first) == [first.id]
    assert world.is_exact(call)


@pytest.mark.parametrize("code", [code for code in Refusal if code is not Refusal.BAD_SHAPE])
def test_what_is_refused_goes_to_another_home(code: Refusal) -> None:
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
    assert not world.refuse(call, first, Refusal.BAD_SHAPE)
    assert call.is_done
    assert call.failure == f"Shard {first.shard_id} does not serve this model: No."


def test_errors_end_the_call_after_max_tries() -> None:
    world = World(on("a", "b"), CallPolicy(max_tries=3))
    call, asks = world.start([0, 1, 2])
    while not call.is_done:
        asks = [again for ask in asks for again in world.refuse(call, ask, Refusal.FAILED)] or world.tick(call, 1.0)
    assert call.failure is not None
    assert "in max_tries = 3 tries; shard" in call.failure
    assert world.fleet.traffic.refusals == {"FAILED": 3}


def test_a_storm_of_refusals_is_answered_with_longer_and_longer_pauses() -> None:
    world = World(on("a", "b"), replace(POLICY, heal_timeout_s=5.0))
    call, asks = world.start([0, 1, 2])
    started_at, num_asked = world.now, len(asks)
    while not call.is_done:
        asks = [again for ask in asks for again in world.refuse(call, ask, Refusal.NOT_HOSTED)]
        num_asked += len(asks)
        if not asks and not call.is_done:
            assert call.wake_at > world.now
            asks = world.tick(call, call.wake_at - world.now)
            num_asked += len(asks)
    assert call.failure is not None
    assert "experts [0, 1, 2] had no live home for heal_timeout_s = 5.0; shard" in call.failure
    assert 5.0 <= world.now - started_at < 5.6
    assert num_asked < 40


def test_a_busy_shard_is_asked_again_until_the_calls_deadline() -> None:
    world = World(on("a"), replace(POLICY, timeout_s=1.0, heal_timeout_s=60.0))
    call, asks = world.start([0, 1, 2])
    started_at = world.now
    while not call.is_done:
        asks = [again for ask in asks for again in world.refuse(call, ask, Refusal.OVERLOADED)]
        asks = asks or world.tick(call, call.wake_at - world.now)
    assert "within timeout_s = 1.0" in str(call.failure)
    assert world.now - started_at < 1.1


def test_what_was_lost_or_corrupt_goes_to_another_home_and_the_shard_rests() -> None:
    for fault in (World.lose, World.corrupt):
        world = World(on("a", "b"))
        call, [first] = world.start([0, 1, 2])
        [second] = fault(world, call, first)
        assert second.shard_id != first.shard_id
        assert world.fleet.circuits(world.now) == {first.shard_id: "open", second.shard_id: "closed"}
        assert not world.answer(call, first)  # what comes for all that
        world.answer(call, second)
        assert world.is_exact(call)
    assert world.fleet.traffic.num_corrupt == 1


def test_without_a_live_home_the_call_waits_and_goes_on_when_one_comes_up() -> None:
    world = World(on("a"))
    world.link("a", Link.DOWN)
    call, asks = world.start([0, 1, 2])
    assert not asks
    assert not call.is_done
    num_ticks = 0
    while world.now < 103.0:
        num_ticks += 1
        assert not world.tick(call, call.wake_at - world.now)
    assert num_ticks < 20
    world.link("a", Link.UP)
    [ask] = world.sent(call.on_change(world.now))
    world.answer(call, ask)
    assert world.is_exact(call)
    assert world.fleet.traffic.num_heals == 1


def test_the_time_without_a_home_does_not_count_towards_the_calls() -> None:
    world = World(on("a"), CallPolicy(timeout_s=1.0, heal_timeout_s=5.0))
    world.link("a", Link.DOWN)
    call, _ = world.start([0, 1, 2])
    while world.now < 104.0:
        assert not world.tick(call, call.wake_at - world.now)
    world.link("a", Link.UP)
    [ask] = world.sent(call.on_change(world.now))
    assert not world.tick(call, 0.9)
    assert not call.is_done
    world.tick(call, 0.2)
    assert "within timeout_s = 1.0: the shards ['a'] still owe an answer" in str(call.failure)
    assert not world.answer(call, ask)


def test_only_the_picks_without_a_home_wait() -> None:
    world = World(tuple(("a" if e % 2 else "b",) for e in range(NUM_EXPERTS)))
    world.link("a", Link.DOWN)
    call, [ask] = world.start([0, 1, 2])
    assert ask.shard_id == "b"
    world.answer(call, ask)
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
        call, [ask] = world.start([0, 1, 2])
        hedge = hit_late(world, call, ask)
        for one in [*hedge, ask]:
            world.answer(call, one)
        world.now += 60.0  # rests are over
        world.healths[ask.shard_id].succeed()
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


def test_a_shard_that_works_through_its_messages_is_not_late() -> None:
    world = World((("a", "b"),) * 6 + (("a",),) * 6)
    world.link("b", Link.DOWN)
    call, asks = world.start([0, 1, 2] * 6, max_rows=1)
    world.link("b", Link.UP)
    for ask in asks:
        assert not world.tick(call, ask.late_after_s * 0.9)
        world.answer(call, ask)
    assert world.is_exact(call)


def test_a_shard_that_lost_a_hedge_rests_until_it_answers() -> None:
    world = World(on("a", "b"))
    call, [first] = world.start([0, 1, 2])
    [second] = hit_late(world, call, first)
    world.answer(call, second)
    for _ in range(3):
        call, asks = world.start([0, 1, 2])
        assert shards_of(asks) == [second.shard_id]
        world.answer(call, asks[0])
    call.on_reply(first.id, QUICK, world.now)
    assert world.fleet.circuits(world.now) == {"a": "closed", "b": "closed"}


def test_a_shard_that_keeps_losing_rests_longer_and_longer_and_is_probed() -> None:
    world = World(on("a", "b"))
    health = world.healths["a"]
    health.fail(world.now)
    health.fail(world.now)  # one rest at a time
    assert health.rests_until == world.now + world.policy.first_rest_s
    world.fleet.is_changed = True
    rests = []
    for _ in range(4):
        world.fleet.refresh()
        rests.append(health.rests_until - world.now)
        assert world.fleet.circuits(world.now)["a"] == "open"
        world.now = health.rests_until + 0.001
        assert world.fleet.circuits(world.now)["a"] == "half-open"  # although nobody has called
        call, asks = world.start([0, 1, 2])
        probe = next(ask for ask in asks if ask.shard_id == "a")
        assert probe.race is None
        assert health.circuit is Circuit.HALF_OPEN
        world.answer(call, next(ask for ask in asks if ask is not probe))
        assert call.is_done
        world.now += world.policy.stall_s + 0.001
        call, [only] = world.start([0, 1, 2])
        world.answer(call, only)
        assert health.circuit is Circuit.OPEN
        assert world.fleet.take_unanswered() == [health]
    assert rests[0] < rests[1] < rests[2] < rests[3] <= 4.1
    call.on_reply(probe.id, QUICK, world.now)
    assert health.circuit is Circuit.OPEN  # too late to be sure
    world.now = health.rests_until + 0.001
    call, asks = world.start([0, 1, 2])
    world.counts.clear()
    for ask in asks:
        world.answer(call, ask)
    assert world.is_exact(call)
    assert health.circuit is Circuit.CLOSED


def test_a_rest_has_a_bound() -> None:
    health = ShardHealth("a", CallPolicy(max_rest_s=3.0))
    for _ in range(2000):
        health.fail(0.0)
        health.circuit = Circuit.HALF_OPEN
    health.fail(0.0)
    assert health.rests_until == 3.0


def test_a_resting_shard_is_asked_where_there_is_no_other() -> None:
    world = World(on("a"))
    world.fleet.note_fault(world.healths["a"], world.now)
    call, [ask] = world.start([0, 1, 2])
    world.answer(call, ask)
    assert world.is_exact(call)
    assert world.fleet.circuits(world.now) == {"a": "closed"}


def test_a_shard_that_becomes_much_slower_gets_less() -> None:
    world = World(on("a", "b"), mib=1.0)
    for _ in range(40):
        call, asks = world.start([0, 1, 2] * 8)
        world.now += 0.01
        for ask in asks:
            slow = 20 if ask.shard_id == "a" else 1
            took_us = slow * 100 * ask.num_rows
            world.answer(call, ask, Timing(0, min(took_us, 9999), 0))
        world.fleet.learn()
    call, asks = world.start(list(range(NUM_EXPERTS)) * 8)
    num_picks = {ask.shard_id: len(ask.picks) for ask in asks}
    assert num_picks.get("a", 0) < num_picks["b"] / 4


def test_a_pace_that_a_shard_publishes_moves_work() -> None:
    world = World(on("a", "b"))
    paces = {"a": Pace(50.0, 2000.0, 200.0), "b": Pace()}
    placement = Placement(2, {0: on("a", "b")}, {0: 0})
    world.fleet = Fleet(POLICY)
    healths = {id: ShardHealth(id, POLICY, paces[id], link=Link.UP) for id in paces}
    world.fleet.adopt(FleetView(placement, healths, paces), world.now)
    _, asks = world.start(list(range(NUM_EXPERTS)) * 8)
    num_picks = {ask.shard_id: len(ask.picks) for ask in asks}
    assert num_picks.get("a", 0) < num_picks["b"] / 4


def test_a_new_pace_counts_at_once_for_a_shard_that_was_never_asked_and_fades_in_for_others() -> None:
    fresh, known = (ShardHealth(id, POLICY, link=Link.UP) for id in "ab")
    work, slower = Work(4, 8, 1.0), Pace(500.0, 1000.0, 100.0)
    known.answer(work, Timing(0, 530, 0), 0.001, 0.001, now=1.0)
    before = known.compute_us(work)
    for health in (fresh, known):
        health.adopt(slower, now=1.0)
    assert fresh.compute_us(work) == 500.0 + 4 * 1000.0 + 8 * 100.0
    assert known.compute_us(work) == pytest.approx(before)


def test_standby_homes_are_asked_only_where_no_home_may_be() -> None:
    world = World(on("a"), standby=on("b"))
    call, [ask] = world.start([0, 1, 2])
    assert (ask.shard_id, ask.is_promoting) == ("a", False)
    assert not hit_late(world, call, ask)  # nobody promotes because of a moment's delay
    [second] = world.tick(call, ask.stalled_after_s)
    assert (second.shard_id, second.is_promoting) == ("b", True)
    world.answer(call, second)
    assert world.is_exact(call)


def test_a_standby_home_has_time_to_bring_experts_to_its_device() -> None:
    cold: Homes = ((),) * NUM_EXPERTS
    world = World(cold, CallPolicy(timeout_s=30.0), standby=on("b", "c"))
    call, [ask] = world.start([0, 1, 2])
    assert not world.tick(call, world.policy.promote_s)
    [second] = world.tick(call, ask.stalled_after_s)
    assert second.shard_id != ask.shard_id
    world.answer(call, ask)
    assert world.is_exact(call)


@dataclass(order=True)
class Event:
    at: float
    order: int
    what: str = field(compare=False)
    ask_id: int = field(compare=False, default=0)


def run_by_seed(seed: int) -> None:
    """A network that loses, delays, repeats and reorders; shards that refuse, hang and come back; new placements."""
    chance = random.Random(seed)
    ids = [f"s{i}" for i in range(chance.randint(1, 5))]

    def random_homes() -> Homes:
        return tuple(tuple(chance.sample(ids, min(len(ids), chance.randint(1, 3)))) for _ in range(NUM_EXPERTS))

    policy = CallPolicy(timeout_s=60.0, heal_timeout_s=60.0, max_tries=1000, hedge_burst=chance.choice([0.0, 8.0]))
    world = World(random_homes(), policy)
    troubles = chance.uniform(0.0, 0.6)
    events: list[Event] = []

    def post(asks: list[Ask]) -> None:
        for ask in world.sent(asks):
            roll = chance.random() / max(troubles, 1e-9)
            delay = chance.choice([0.0005, 0.002, 0.04, 0.8]) * chance.random()
            kinds = ["refuse", "lose", "corrupt", "silent", "twice"] if roll < 1 else ["reply"]
            kind = chance.choice(kinds)
            for _ in range(2 if kind == "twice" else 1):
                events.append(Event(world.now + delay, len(world.asks), kind, ask.id))
                delay *= 1.5
            if kind == "silent":  # a hung stream is broken in the end, by whoever notices
                events[-1] = Event(world.now + 3.0, len(world.asks), "lose", ask.id)

    for _ in range(3):
        world.counts.clear()
        num_rows = chance.randint(1, 6)
        experts = [e for _ in range(num_rows) for e in chance.sample(range(NUM_EXPERTS), TOP_K)]
        call, asks = world.start(experts, max_rows=chance.randint(1, 4))
        post(asks)
        while not call.is_done:
            if world.now > call.started_at + 20.0:  # the fleet heals, in the end
                troubles = 0.0
                for id in ids:
                    world.link(id, Link.UP)
            elif chance.random() < 0.1:
                if chance.random() < 0.5:
                    world.place(random_homes())
                else:
                    world.link(chance.choice(ids), chance.choice([Link.UP, Link.DOWN, Link.UP]))
                post(call.on_change(world.now))
            events.sort()
            if not events or events[0].at > call.wake_at:
                world.now = max(world.now, call.wake_at)
                post(call.on_tick(world.now))
                troubles *= 0.9
            else:
                event = events.pop(0)
                world.now, ask = max(world.now, event.at), world.asks[event.ask_id]
                if event.what in ("reply", "twice"):
                    assert not world.answer(call, ask, Timing(0, 50, chance.randint(0, 3))) or not ask.is_beaten
                elif event.what == "refuse":
                    code = chance.choice([code for code in Refusal if code is not Refusal.BAD_SHAPE])
                    post(call.on_refusal(ask.id, code, "No.", world.now))
                    world.healths[ask.shard_id].is_draining = False
                elif event.what == "lose":
                    post(call.on_lost(ask.id, world.now))
                else:
                    post(call.on_corrupt(ask.id, "It was changed.", world.now))
        assert world.is_exact(call), (call.failure, world.counts)
    traffic, num_asked = world.fleet.traffic, len(world.asks)
    assert traffic.num_hedged <= policy.hedge_burst + policy.hedge_share * num_asked


@pytest.mark.parametrize("first_seed", range(0, 1000, 100))
def test_each_pick_counts_once_whatever_happens(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        try:
            run_by_seed(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
