"""These tests drive a fleet with late shards, open circuits, probes, uneven speeds and standbys."""

from __future__ import annotations

import pytest

from cluster.dispatch.call_policy import CallPolicy
from cluster.dispatch.fleet_view import FleetView, ShardFleet
from cluster.dispatch.shard_health import Circuit, LinkState, ReplyTiming, ShardHealth, Work
from cluster.topology import CostModel, Homes, Placement
from tests.cluster.dispatch.calls_world import NUM_EXPERTS, POLICY, QUICK, World, hit_late, on, shards_of


def test_a_shard_that_works_through_its_messages_is_not_late() -> None:
    world = World((("a", "b"),) * 6 + (("a",),) * 6)
    world.link("b", LinkState.DOWN)
    call, requests = world.start([0, 1, 2] * 6, max_rows=1)
    world.link("b", LinkState.UP)
    for request in requests:
        assert not world.tick(call, request.late_after_s * 0.9)
        world.answer(call, request)
    assert world.is_exact(call)


def test_a_shard_that_lost_a_hedge_rests_until_it_answers() -> None:
    world = World(on("a", "b"))
    call, [first] = world.start([0, 1, 2])
    [second] = hit_late(world, call, first)
    world.answer(call, second)
    for _ in range(3):
        call, requests = world.start([0, 1, 2])
        assert shards_of(requests) == [second.shard_id]
        world.answer(call, requests[0])
    call.on_reply(first.id, QUICK, world.now)
    assert world.fleet.circuits(world.now) == {"a": "closed", "b": "closed"}


def test_a_shard_that_keeps_losing_rests_longer_and_longer_and_is_probed() -> None:
    world = World(on("a", "b"))
    health = world.healths["a"]
    health.fail(world.now)
    health.fail(world.now)  # a second failure does not keep an open circuit open for longer
    assert health.rests_until == world.now + world.policy.first_rest_s
    world.fleet.is_changed = True
    rests = []
    for _ in range(4):
        world.fleet.refresh()
        rests.append(health.rests_until - world.now)
        assert world.fleet.circuits(world.now)["a"] == "open"
        world.now = health.rests_until + 0.001
        assert world.fleet.circuits(world.now)["a"] == "half-open"  # although no call was made
        call, requests = world.start([0, 1, 2])
        probe = next(request for request in requests if request.shard_id == "a")
        assert probe.race is None
        assert health.circuit is Circuit.HALF_OPEN
        world.answer(call, next(request for request in requests if request is not probe))
        assert call.is_done
        world.now += world.policy.stall_s + 0.001
        call, [only] = world.start([0, 1, 2])
        world.answer(call, only)
        assert health.circuit is Circuit.OPEN
        assert world.fleet.take_resets() == [health]
    assert rests[0] < rests[1] < rests[2] < rests[3] <= 4.1
    call.on_reply(probe.id, QUICK, world.now)
    assert health.circuit is Circuit.OPEN  # the reply to the probe came too late to close the circuit
    world.now = health.rests_until + 0.001
    call, requests = world.start([0, 1, 2])
    world.counts.clear()
    for request in requests:
        world.answer(call, request)
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
    call, [request] = world.start([0, 1, 2])
    world.answer(call, request)
    assert world.is_exact(call)
    assert world.fleet.circuits(world.now) == {"a": "closed"}


def test_a_shard_that_becomes_much_slower_gets_less() -> None:
    world = World(on("a", "b"), expert_mib=1.0)
    for _ in range(40):
        call, requests = world.start([0, 1, 2] * 8)
        world.now += 0.01
        for request in requests:
            slow = 20 if request.shard_id == "a" else 1
            took_us = slow * 100 * request.num_rows
            world.answer(call, request, ReplyTiming(0, min(took_us, 9999), 0))
        world.fleet.learn()
    call, requests = world.start(list(range(NUM_EXPERTS)) * 8)
    num_picks = {request.shard_id: len(request.picks) for request in requests}
    assert num_picks.get("a", 0) < num_picks["b"] / 4


def test_a_pace_that_a_shard_publishes_moves_work() -> None:
    world = World(on("a", "b"))
    cost_models = {"a": CostModel(50.0, 2000.0, 200.0), "b": CostModel()}
    placement = Placement(2, {0: on("a", "b")}, {0: 0})
    world.fleet = ShardFleet(POLICY)
    healths = {id: ShardHealth(id, POLICY, cost_models[id], link=LinkState.UP) for id in cost_models}
    world.fleet.adopt(FleetView(placement, healths, cost_models), world.now)
    _, requests = world.start(list(range(NUM_EXPERTS)) * 8)
    num_picks = {request.shard_id: len(request.picks) for request in requests}
    assert num_picks.get("a", 0) < num_picks["b"] / 4


def test_a_new_pace_counts_at_once_for_a_shard_that_was_never_asked_and_fades_in_for_others() -> None:
    fresh, known = (ShardHealth(id, POLICY, link=LinkState.UP) for id in "ab")
    work, slower = Work(4, 8, 1.0), CostModel(500.0, 1000.0, 100.0)
    known.learn(work, ReplyTiming(0, 530, 0), 0.001, 0.001, now=1.0)
    before = known.compute_us(work)
    for health in (fresh, known):
        health.adopt(slower, now=1.0)
    assert fresh.compute_us(work) == 500.0 + 4 * 1000.0 + 8 * 100.0
    assert known.compute_us(work) == pytest.approx(before)


def test_standby_homes_are_asked_only_where_no_home_may_be() -> None:
    world = World(on("a"), standby=on("b"))
    call, [request] = world.start([0, 1, 2])
    assert (request.shard_id, request.is_promoting) == ("a", False)
    assert not hit_late(world, call, request)  # a short delay makes no standby promote experts
    [second] = world.tick(call, request.stalled_after_s)
    assert (second.shard_id, second.is_promoting) == ("b", True)
    world.answer(call, second)
    assert world.is_exact(call)


def test_a_standby_home_has_time_to_bring_experts_to_its_device() -> None:
    cold: Homes = ((),) * NUM_EXPERTS
    world = World(cold, CallPolicy(timeout_s=30.0), standby=on("b", "c"))
    call, [request] = world.start([0, 1, 2])
    assert not world.tick(call, world.policy.promote_s)
    [second] = world.tick(call, request.stalled_after_s)
    assert second.shard_id != request.shard_id
    world.answer(call, request)
    assert world.is_exact(call)
