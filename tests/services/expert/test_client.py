"""These tests call real shards in other processes. The shards die, hang, become slow and corrupt data."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.dispatch.fleet_view import FleetView
from cluster.topology import CostModel, Homes, Placement, Shard
from model.blocks.expert_bank import LocalExperts
from model.family import ModelFamily
from services.expert import control_client
from services.expert.client import CallPolicy, RemoteExperts
from services.expert.expert_call import ExpertsUnavailable
from tests.services.expert.checkpoint import LATENT, LAYERS, NUM_EXPERTS, TOP_K
from tests.services.expert.corrupting_proxy import CorruptingProxy
from tests.services.expert.shard_process import READ_S, ShardProcess

Rows = tuple[Tensor, Tensor, Tensor]
# A client with this policy sends a request a second time only if the first one is lost, however long the reply takes.
PATIENT = CallPolicy(timeout_s=60.0, stall_s=60.0, hedge_floor_s=60.0)


def make_rows(num_rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, LATENT, generator=generator) * torch.rand(num_rows, 1, generator=generator) * 3
    scores = torch.rand(num_rows, NUM_EXPERTS, generator=generator)
    weights, ids = scores.topk(TOP_K, dim=-1)
    return x.to(dtype), ids, weights


def random_homes(shard_ids: Sequence[str], num_homes: int, seed: int = 0) -> dict[int, Homes]:
    chooser = random.Random(seed)
    num_homes = min(num_homes, len(shard_ids))
    return {layer: tuple(tuple(chooser.sample(shard_ids, num_homes)) for _ in range(NUM_EXPERTS)) for layer in LAYERS}


def everywhere(shard_ids: Sequence[str]) -> dict[int, Homes]:
    return {layer: (tuple(shard_ids),) * NUM_EXPERTS for layer in LAYERS}


def fill(shards: Sequence[Shard], homes: dict[int, Homes], epoch: int = 1) -> Placement:
    return asyncio.run(control_client.fill(shards, homes, epoch))


@pytest.fixture(scope="module")
def fleet(model_dir: Path) -> Iterator[list[Shard]]:
    """Start five shards, each of which holds every expert."""
    with ShardProcess(model_dir, 5) as process:
        fill(process.shards, everywhere([shard.id for shard in process.shards]))
        yield process.shards


@pytest.fixture(scope="module")
def bf16_fleet(model_dir: Path) -> Iterator[list[Shard]]:
    with ShardProcess(model_dir, 3, "bfloat16") as process:
        fill(process.shards, everywhere([shard.id for shard in process.shards]))
        yield process.shards


@pytest.fixture(scope="module")
def local(family: ModelFamily) -> LocalExperts:
    return family.load_local_experts(torch.float32)


def connect(remote: RemoteExperts) -> None:
    """Wait until the client has tried to connect to each shard. The client avoids shards that are not connected."""
    while not all(stream.is_settled for stream in remote.connections.streams):
        time.sleep(0.01)


def num_requests(shard: Shard) -> int:
    """Ask a shard how many requests have reached it since its start."""
    return int(asyncio.run(control_client.status(shard.endpoint)).counters.num_requests)


def placement_on(local: LocalExperts, homes: dict[int, Homes], epoch: int = 1) -> Placement:
    return Placement(epoch, homes, local.gains)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
@pytest.mark.parametrize("num_homes", [1, 2])
def test_remote_equals_local_bit_for_bit(
    num_shards: int, num_homes: int, fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    ids = [shard.id for shard in fleet[:num_shards]]
    for seed in range(3):
        remote.update(placement_on(local, random_homes(ids, num_homes, seed), epoch=seed + 1), fleet)
        for num_rows in (1, 3, 64, 300):
            rows = make_rows(num_rows, seed=num_rows + seed)
            for layer in LAYERS:
                assert torch.equal(remote(layer, *rows)(), local(layer, *rows)())


def test_bf16_rows_equal_local(bf16_fleet: list[Shard], family: ModelFamily, remote: RemoteExperts) -> None:
    local = family.load_local_experts(torch.bfloat16)
    ids = [shard.id for shard in bf16_fleet]
    remote.update(Placement(1, random_homes(ids, 2), local.gains), bf16_fleet)
    for num_rows in (1, 50):
        rows = make_rows(num_rows, torch.bfloat16)
        assert torch.equal(remote(1, *rows)(), local(1, *rows)())


def test_gains_of_the_shards_are_those_of_the_model(fleet: list[Shard], local: LocalExperts) -> None:
    homes = random_homes([shard.id for shard in fleet], 1)
    assert fill(fleet, homes, epoch=1).gains == local.gains


def test_a_big_batch_travels_in_pieces(fleet: list[Shard], local: LocalExperts) -> None:
    remote = RemoteExperts(replace(PATIENT, piece_bytes=10 * LATENT * 4))
    remote.update(placement_on(local, everywhere([fleet[0].id])), fleet)
    rows = make_rows(105)
    assert torch.equal(remote(1, *rows)(), local(1, *rows)())
    assert remote.traffic.num_sent == remote.traffic.num_received == 11
    remote.close()


def test_more_pieces_than_a_shard_queues_are_computed_all_the_same(model_dir: Path, local: LocalExperts) -> None:
    remote = RemoteExperts(CallPolicy(piece_bytes=1))
    with ShardProcess(model_dir, 1, max_queue=2, us_per_row=2000) as process:  # slow enough for a queue to form
        remote.update(fill(process.shards, everywhere([process.shards[0].id])), process.shards)
        rows = make_rows(60)
        assert torch.equal(remote(1, *rows)(), local(1, *rows)())
        assert remote.traffic.refusals["OVERLOADED"] > remote.policy.max_tries
    remote.close()


def test_what_is_sent_is_counted(fleet: list[Shard], local: LocalExperts) -> None:
    remote = RemoteExperts(PATIENT)
    remote.update(placement_on(local, everywhere([fleet[0].id])), fleet)
    remote(1, *make_rows(1))()
    traffic = remote.traffic
    assert (traffic.num_calls, traffic.num_rows, traffic.num_picks, traffic.num_sent) == (1, 1, TOP_K, 1)
    assert LATENT * 4 < traffic.sent_bytes < LATENT * 4 + 128
    assert LATENT * 4 < traffic.received_bytes < LATENT * 4 + 64
    remote.close()


def test_calls_overlap(fleet: list[Shard], local: LocalExperts, remote: RemoteExperts) -> None:
    remote.update(placement_on(local, everywhere([shard.id for shard in fleet])), fleet)
    batches = [make_rows(5, seed=seed) for seed in range(8)]
    waiting = [remote(1, *rows) for rows in batches]
    for wait, rows in reversed(list(zip(waiting, batches, strict=True))):
        assert torch.equal(wait(), local(1, *rows)())


def test_no_rows_need_no_shard(fleet: list[Shard], local: LocalExperts, remote: RemoteExperts) -> None:
    remote.update(placement_on(local, everywhere([fleet[0].id])), fleet)
    assert remote(1, *make_rows(0))().shape == (0, LATENT)
    assert remote.traffic.num_sent == 0


def test_a_home_that_does_not_hold_the_expert_is_passed_over(
    model_dir: Path, fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    with ShardProcess(model_dir, 1, name="empty") as empty:
        shards = [*empty.shards, *fleet[:1]]
        remote.update(placement_on(local, everywhere([shard.id for shard in shards])), shards)
        connect(remote)
        rows = make_rows(20)
        assert torch.equal(remote(1, *rows)(), local(1, *rows)())
        assert remote.traffic.refusals["NOT_HOSTED"] >= 1


def test_experts_that_moved_while_the_rows_were_away_are_found(
    model_dir: Path, fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    with ShardProcess(model_dir, 1, name="empty") as empty:
        shards = [*empty.shards, *fleet[:1]]
        remote.update(placement_on(local, everywhere([shards[0].id]), epoch=1), shards)
        rows = make_rows(20)
        wait = remote(1, *rows)
        remote.update(placement_on(local, everywhere([shards[1].id]), epoch=2), shards)
        assert torch.equal(wait(), local(1, *rows)())


def test_an_older_placement_is_passed_over(fleet: list[Shard], local: LocalExperts, remote: RemoteExperts) -> None:
    remote.update(placement_on(local, everywhere([fleet[0].id]), epoch=5), fleet)
    remote.update(placement_on(local, everywhere(["gone"]), epoch=1), fleet)
    rows = make_rows(3)
    assert remote.epoch == 5
    assert torch.equal(remote(1, *rows)(), local(1, *rows)())


def test_another_placement_of_the_same_epoch_is_used(
    fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    rows = make_rows(3)
    for shard in fleet[:2]:
        remote.update(placement_on(local, everywhere([shard.id])), fleet)
        assert torch.equal(remote(1, *rows)(), local(1, *rows)())


def test_the_tables_of_a_placement_are_made_once(
    fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    remote.update(placement_on(local, everywhere([fleet[0].id]), epoch=1), fleet)
    assert remote.connections.view is not None
    table = remote.connections.view.tables[LAYERS[0]]
    remote.update(placement_on(local, everywhere([fleet[0].id]), epoch=2), fleet)
    assert remote.connections.view.tables[LAYERS[0]] is table


def test_the_silence_allowed_grows_with_the_work_and_leaves_time_for_another_home() -> None:
    policy = CallPolicy(timeout_s=20.0, stall_s=0.5, patience=8.0)
    assert [policy.allowed_silence_s(predicted) for predicted in (0.0, 0.25, 60.0)] == [0.5, 2.5, 5.5]


def test_a_shard_that_computes_for_long_is_left_to_it(model_dir: Path, fleet: list[Shard], local: LocalExperts) -> None:
    """Ask a shard for 100 rows, which take 2 seconds there, with limits that allow a silence of 0.2 and of 15 seconds.

    The longer limit is `stall_s` and a quarter of `timeout_s`, because 8 times the predicted time is even longer.
    """
    few, many = make_rows(60), make_rows(100)
    with ShardProcess(model_dir, 1, name="slow", us_per_row=20_000) as slow:
        shards = [*slow.shards, fleet[0]]
        fill(slow.shards, everywhere([slow.shards[0].id]))
        never = {"far_slower": 1e6, "reset_after": 1e6, "hedge_burst": 0.0}
        for patience, num_stalled in ((8.0, 0), (0.0, 1)):
            policy = CallPolicy(timeout_s=60.0, stall_s=0.2, patience=patience, **never)
            remote = RemoteExperts(policy)
            remote.update(placement_on(local, everywhere([slow.shards[0].id]), epoch=1), shards)
            remote(1, *few)()  # this call shows the client how long a row takes
            remote.update(placement_on(local, everywhere([shard.id for shard in shards]), epoch=2), shards)
            connect(remote)
            prefer(remote, slow.shards[0].id, 1e7)
            assert torch.equal(remote(1, *many)(), local(1, *many)())
            assert remote.traffic.num_stalled == num_stalled
            remote.close()


def test_a_draining_shard_is_passed_over(
    model_dir: Path, fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    with ShardProcess(model_dir, 1, name="leaving") as leaving:
        shards = [*leaving.shards, *fleet[:1]]
        homes = everywhere([shard.id for shard in shards])
        fill(shards, homes)
        asyncio.run(control_client.drain(leaving.shards[0].endpoint))
        remote.update(placement_on(local, homes), shards)
        connect(remote)
        rows = make_rows(20)
        assert torch.equal(remote(1, *rows)(), local(1, *rows)())
        assert remote.traffic.refusals["DRAINING"] >= 1


def ask_many(remote: RemoteExperts, local: LocalExperts, num_calls: int, between: float = 0.0) -> None:
    """Make `num_calls` calls of 8 rows, and wait `between` seconds after each call.

    The function asserts that the sums equal the local sums bit for bit.
    """
    for seed in range(num_calls):
        rows = make_rows(8, seed=seed)
        assert torch.equal(remote(1, *rows)(), local(1, *rows)())
        time.sleep(between)


def ask_until_all_reach(shard: Shard, remote: RemoteExperts, local: LocalExperts) -> None:
    """Make calls until all of 20 calls in a row have sent a message to `shard`.

    A circuit that opens because the machine stalls only causes another attempt.
    """
    for _ in range(50):
        before = num_requests(shard)
        ask_many(remote, local, 20)
        if num_requests(shard) >= before + 20:
            return
    raise AssertionError(f"The calls do not go to {shard.id}; its circuit is {remote.circuits[shard.id]}.")


def prefer(remote: RemoteExperts, shard_id: str, call_us: float = 1e5) -> None:
    """Make all other shards cost `call_us` more per call. While `shard_id` is available, all picks then go to it."""
    view = remote.connections.view
    assert view is not None
    cost_models = {id: CostModel(call_us=call_us) for id in view.shard_ids if id != shard_id}
    remote.connections.view = FleetView(view.placement, view.healths, cost_models)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_rows_of_a_dead_or_hung_shard_go_to_another_home_at_once(
    sent: signal.Signals, model_dir: Path, fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    with ShardProcess(model_dir, 1, name="doomed") as doomed:
        shards = [*doomed.shards, *fleet[:2]]
        homes = everywhere([shard.id for shard in shards])
        fill(shards, homes)
        remote.update(placement_on(local, homes), shards)
        connect(remote)
        prefer(remote, doomed.shards[0].id)
        ask_until_all_reach(doomed.shards[0], remote, local)
        before = replace(remote.traffic)
        os.kill(doomed.process.pid, sent)
        stopped_at, num_calls = time.monotonic(), 0
        while time.monotonic() < stopped_at + (10.0 if sent is signal.SIGSTOP else 2.0) or num_calls < 50:
            ask_many(remote, local, 5, between=0.02)
            num_calls += 5
        # Each message to the doomed shard was lost, or is still in flight. Usually there is one message beside the
        # probes. A client that notices nothing sends one message with each call.
        traffic, in_flight = remote.traffic, remote._fleet.in_flight.values()
        num_sent = traffic.num_lost - before.num_lost + sum(request.shard_id == "doomed0" for request in in_flight)
        assert num_sent <= traffic.num_probes - before.num_probes + num_calls // 2
        if sent is signal.SIGSTOP:
            assert traffic.num_hedged + traffic.num_stalled > before.num_hedged + before.num_stalled
            assert remote.circuits["doomed0"] != "closed"
            assert traffic.num_hedged <= remote.policy.hedge_burst + 0.03 * traffic.num_sent
            os.kill(doomed.process.pid, signal.SIGCONT)
            ended_at = time.monotonic() + 90
            while remote.circuits["doomed0"] != "closed" and time.monotonic() < ended_at:
                ask_many(remote, local, 5, between=0.02)
            assert remote.circuits["doomed0"] == "closed"


def test_a_shard_twenty_times_slower_is_hardly_asked(
    model_dir: Path, local: LocalExperts, remote: RemoteExperts
) -> None:
    with (
        ShardProcess(model_dir, 1, name="quick", us_per_row=500) as quick,
        ShardProcess(model_dir, 1, name="slow", us_per_row=10_000) as slow,
    ):
        shards = [*quick.shards, *slow.shards]
        fill(shards, everywhere([shard.id for shard in shards]))
        remote.update(placement_on(local, everywhere([shard.id for shard in shards])), shards)
        connect(remote)
        prefer(remote, "slow0")
        ask_many(remote, local, 60)
        # Usually two calls. Without circuits and measurements, all 60 calls go to the slow shard.
        assert 1 <= num_requests(slow.shards[0]) <= 30


def test_corrupt_sums_are_found_out_and_computed_elsewhere(
    model_dir: Path, fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    with ShardProcess(model_dir, 1, name="liar", trouble="corrupt") as liar:
        shards = [*liar.shards, *fleet[:1]]
        homes = everywhere([shard.id for shard in shards])
        fill(shards, homes)
        remote.update(placement_on(local, homes), shards)
        connect(remote)
        prefer(remote, "liar0")
        ask_many(remote, local, 100, between=0.01)
        # Usually three replies, because the circuit stays open longer after each corrupt reply. A client that trusts
        # the shard again at once gets 100.
        assert 1 <= remote.traffic.num_corrupt <= 30
        assert remote.circuits["liar0"] != "closed"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("to", ["to_client", "to_shard"])
def test_bytes_that_change_on_the_way_change_no_sum(
    seed: int, to: str, fleet: list[Shard], local: LocalExperts
) -> None:
    remote = RemoteExperts(CallPolicy(stall_s=0.1))
    rate = {to: 10_000}
    with CorruptingProxy(fleet[0].compute_endpoint, **rate, seed=seed) as proxy:
        shards = [replace(fleet[0], compute_endpoint=proxy.endpoint), fleet[1]]
        ids = tuple(shard.id for shard in shards)
        # Half of the experts have only one home: the shard behind the proxy.
        homes: dict[int, Homes] = dict.fromkeys(LAYERS, (ids, ids[:1]) * (NUM_EXPERTS // 2))
        remote.update(placement_on(local, homes), shards)
        ask_many(remote, local, 100)
        assert proxy.num_changed > 5
        traffic = remote.traffic
        assert traffic.num_corrupt + traffic.num_lost + sum(traffic.refusals.values()) > 3
    remote.close()


def test_a_call_without_a_live_home_waits_until_the_fleet_has_healed(
    model_dir: Path, fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    with ShardProcess(model_dir, 1, name="lost") as lost:
        homes = everywhere(["lost0"])
        fill(lost.shards, homes)
        remote.update(placement_on(local, homes), lost.shards)
        ask_many(remote, local, 3)
        lost.process.kill()
        lost.process.join()
        rows = make_rows(8)
        wait = remote(1, *rows)
        healed = placement_on(local, everywhere([fleet[0].id]), epoch=2)
        healing = threading.Timer(1.5, lambda: remote.update(healed, fleet))
        healing.start()
        busy_s = time.thread_time()
        assert torch.equal(wait(), local(1, *rows)())
        assert remote.epoch == 2  # the call has waited for the new placement
        assert time.thread_time() - busy_s < 0.75  # usually 0.01 s; a thread that asks again and again needs 1.5 s
        healing.join()


def test_a_call_that_waits_is_given_up_when_the_backbone_stops(
    fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    remote.update(placement_on(local, everywhere(["gone"])), fleet)
    wait = remote(1, *make_rows(2))
    threading.Timer(0.3, remote.give_up).start()
    with pytest.raises(ExpertsUnavailable, match=r"Layer 1 is given up, because this backbone stops\."):
        wait()


def test_a_shard_that_stands_by_is_waited_for(model_dir: Path, local: LocalExperts, remote: RemoteExperts) -> None:
    with ShardProcess(model_dir, 2, name="cold", trouble="slow disk") as cold:
        everything = {layer: list(range(NUM_EXPERTS)) for layer in LAYERS}
        for shard in cold.shards:
            asyncio.run(control_client.load(shard.endpoint, {}, standby=everything))
        nowhere: dict[int, Homes] = dict.fromkeys(LAYERS, ((),) * NUM_EXPERTS)
        standby = everywhere([shard.id for shard in cold.shards])
        remote.update(Placement(1, nowhere, local.gains, standby=standby), cold.shards)
        connect(remote)
        num_promotions = []
        for _ in range(2):
            ask_many(remote, local, 1)
            counters = [asyncio.run(control_client.status(shard.endpoint)).counters for shard in cold.shards]
            num_promotions.append(sum(of.num_promotions for of in counters))
            assert sum(of.promotion_us for of in counters) >= READ_S * 1e6 * num_promotions[0]
        assert num_promotions[0] == num_promotions[1] == len(make_rows(8)[1].unique())
        assert (remote.traffic.num_hedged, remote.traffic.num_stalled) == (0, 0)


def test_a_shard_that_was_never_connected_holds_up_nothing_another_can_do(
    fleet: list[Shard], local: LocalExperts
) -> None:
    remote = RemoteExperts(PATIENT)
    remote.update(placement_on(local, everywhere([fleet[0].id]), epoch=1), fleet)
    connect(remote)
    rows = make_rows(30)
    expected = local(1, *rows)()
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the socket accepts connections and sends nothing
        endpoint = f"127.0.0.1:{mute.getsockname()[1]}"
        silent = replace(fleet[0], id="silent", endpoint=endpoint, compute_endpoint=endpoint)
        shards = [silent, fleet[0]]
        remote.update(placement_on(local, everywhere([shard.id for shard in shards]), epoch=2), shards)
        before, num_sent = num_requests(fleet[0]), remote.traffic.num_sent
        assert torch.equal(remote(1, *rows)(), expected)
        # No message waited for the silent shard.
        assert remote.traffic.num_sent == num_sent + 1
        assert num_requests(fleet[0]) == before + 1
        assert remote.traffic.num_heals == 0
    remote.close()


def test_a_shard_that_comes_back_is_used_again(model_dir: Path, local: LocalExperts, remote: RemoteExperts) -> None:
    with ShardProcess(model_dir, 1) as process:
        homes = everywhere([process.shards[0].id])
        fill(process.shards, homes)
        remote.update(placement_on(local, homes), process.shards)
        rows = make_rows(4)
        os.kill(process.process.pid, signal.SIGSTOP)
        wait = remote(1, *rows)
        time.sleep(1.0)
        os.kill(process.process.pid, signal.SIGCONT)
        assert torch.equal(wait(), local(1, *rows)())
        assert not remote.down


def test_without_a_live_home_the_error_says_what_is_missing(model_dir: Path, local: LocalExperts) -> None:
    remote = RemoteExperts(CallPolicy(heal_timeout_s=0.5))
    with ShardProcess(model_dir, 1) as process:
        homes = everywhere([process.shards[0].id])
        fill(process.shards, homes)
        remote.update(placement_on(local, homes), process.shards)
        connect(remote)
        rows = make_rows(4)
        remote(1, *rows)()
        process.process.kill()
        process.process.join()
        sentence = r"Layer 1 cannot be computed: The experts \[.*\] had no live home for heal_timeout_s = 0.5; "
        with pytest.raises(ExpertsUnavailable, match=sentence):
            remote(1, *rows)()
        assert remote.down == {process.shards[0].id}
    remote.close()


def test_a_shard_of_another_dtype_is_not_asked_twice(
    bf16_fleet: list[Shard], local: LocalExperts, remote: RemoteExperts
) -> None:
    remote.update(placement_on(local, everywhere([bf16_fleet[0].id])), bf16_fleet)
    with pytest.raises(ExpertsUnavailable, match=r"computes in torch.bfloat16"):
        remote(1, *make_rows(2))()


def test_rows_of_an_odd_dtype_are_refused(fleet: list[Shard], local: LocalExperts, remote: RemoteExperts) -> None:
    remote.update(placement_on(local, everywhere([fleet[0].id])), fleet)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, not as torch.float64"):
        remote(1, *make_rows(2, torch.float64))
