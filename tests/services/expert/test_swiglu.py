"""These tests serve, send and check experts with three matrices (SwiGLU), on rows of the hidden size."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cluster.control.manifest import Manifest
from cluster.topology import Homes, Placement
from services.expert import control_client
from services.expert.client import CallPolicy, RemoteExperts
from services.expert.shard import ExpertShard
from services.expert.weights import transfer
from services.expert.weights.load_order import Sources
from services.expert.weights.transfer import PeerChannels, PeerError, fetch
from services.expert.weights.weights import CHUNK_BYTES, Weights
from tests.model.stored_matrices import same_bits
from tests.services.expert.checkpoint import LAYERS, NUM_EXPERTS, TOP_K
from tests.services.expert.serving import CONFIG, run, serving
from tests.services.expert.swiglu import (
    HIDDEN,
    MIXED,
    PLAIN,
    WIDTH,
    SwigluFamily,
    expert_bytes,
    write_swiglu_checkpoint,
)

ALL = list(range(NUM_EXPERTS))
Stored = tuple[SwigluFamily, torch.dtype]  # a family and the dtype in which its experts compute


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no fetch fail because a busy machine stalls for seconds."""
    monkeypatch.setattr(transfer, "FETCH_STALL_S", 30.0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> SwigluFamily:
    return write_swiglu_checkpoint(tmp_path_factory.mktemp("swiglu"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> SwigluFamily:
    """Return a family whose experts have one matrix in each quantized format."""
    return write_swiglu_checkpoint(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(params=["plain float32", "plain bfloat16", "mixed float32"])
def stored(
    request: pytest.FixtureRequest, family: SwigluFamily, mixed: SwigluFamily
) -> tuple[SwigluFamily, torch.dtype]:
    """Return a family and the dtype in which its experts compute."""
    formats, dtype = request.param.split()
    return mixed if formats == "mixed" else family, getattr(torch, dtype)


def make_rows(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    weights, ids = torch.rand(num_rows, NUM_EXPERTS, generator=generator).topk(TOP_K, dim=-1)
    return torch.randn(num_rows, HIDDEN, generator=generator).to(dtype), ids, weights


def on_device(shard: ExpertShard, layer: int, expert: int) -> Weights:
    return Weights(shard.host.on_device.banks[layer].matrices(expert))


def test_shards_equal_local_experts_bit_for_bit(stored: Stored) -> None:
    family, dtype = stored
    local = family.load_local_experts(dtype)
    remote = RemoteExperts(CallPolicy(timeout_s=20.0))
    homes: dict[int, Homes] = {layer: tuple((f"s{expert % 2}",) for expert in ALL) for layer in LAYERS}

    def ask() -> None:
        for num_rows in (1, 3, 64):
            rows = make_rows(num_rows, dtype)
            for layer in LAYERS:
                assert torch.equal(remote(layer, *rows)(), local(layer, *rows)())

    async def test() -> None:
        one, other = (replace(CONFIG, shard_id=id, dtype=dtype, max_queue=64) for id in ("s0", "s1"))
        async with serving(family, config=one) as s0, serving(family, config=other) as s1:
            shards = [s0.record, s1.record]
            placement = await control_client.fill(shards, homes, 1)
            assert placement.gains == local.gains
            remote.update(Placement(1, homes, local.gains), shards)
            await asyncio.to_thread(ask)

    run(test)
    remote.close()


def test_every_tier_of_a_peer_gives_three_matrices(stored: Stored) -> None:
    """Check that a shard gets homes and standbys in host memory and on disk from a peer, bit for bit."""
    family, dtype = stored
    formats = PLAIN if family.expert_shapes[0].formats == () else MIXED
    size = expert_bytes(formats, dtype)
    config = replace(CONFIG, dtype=dtype, host_budget=8 * size)

    async def test() -> None:
        async with serving(family, config=config) as peer, serving(family, config=replace(config, shard_id="s1")) as s1:
            known = await control_client.load(peer.endpoint, {1: ALL[:16]}, 1, {1: ALL[16:]})
            assert peer.host.used_bytes == 16 * size
            assert len(peer.host.standbys.in_host_memory) == 8
            s1.service.source.read = lambda layer, expert: pytest.fail("the checkpoint was read")
            expected = {(1, expert): checksum for expert, checksum in known.checksums[1].items()}
            sources = Sources({(1, expert): peer.endpoint for expert in ALL}, expected)
            loaded = await control_client.load(s1.endpoint, {1: ALL}, 1, sources=sources)
            assert Manifest(known.checksums).mismatches(loaded.checksums) == []
            assert loaded.gains == known.gains
            for expert in ALL:
                raw, held = family.load_expert(1, expert), on_device(s1, 1, expert)
                assert list(held.matrices) == ["gate", "up", "down"]
                assert held.nbytes == size
                assert held.checksum == expected[1, expert]
                assert tuple(matrix.format for matrix in held.matrices.values()) == formats
                for name, matrix in held.matrices.items():
                    expected_parts = raw[name].to("cpu", dtype).parts
                    assert all(same_bits(*parts) for parts in zip(matrix.parts, expected_parts, strict=True))

    run(test)


def test_a_peer_with_other_formats_is_replaced_by_the_checkpoint(family: SwigluFamily, mixed: SwigluFamily) -> None:
    """Check that a shard with quantized experts takes no plain experts from a peer, and the reverse."""
    here = "This shard stores the experts of layer 1 as gate"

    async def test(theirs: SwigluFamily, ours: SwigluFamily) -> None:
        async with serving(theirs) as peer, serving(ours, config=replace(CONFIG, shard_id="s1")) as shard:
            await control_client.load(peer.endpoint, {1: ALL[:4]})
            sources = Sources({(1, expert): peer.endpoint for expert in ALL[:4]})
            await control_client.load(shard.endpoint, {1: ALL[:4]}, sources=sources)
            for expert in ALL[:4]:
                weights = Weights.of(ours.load_expert(1, expert), torch.float32)
                assert on_device(shard, 1, expert).checksum == weights.checksum
            async with PeerChannels() as peers:
                with pytest.raises(PeerError, match=f"FAILED_PRECONDITION: {here} .*, but the request is for gate "):
                    await fetch(peers[peer.endpoint], shard.host.shapes[1], 0, torch.float32)

    run(lambda: test(family, mixed))
    run(lambda: test(mixed, family))


def test_the_checksum_tells_the_matrices_apart(family: SwigluFamily) -> None:
    """Check that an expert whose gate and up are exchanged, which have the same sizes, has another checksum."""
    matrices = family.load_expert(1, 0)
    exchanged = {"gate": matrices["up"], "up": matrices["gate"], "down": matrices["down"]}
    one, other = Weights.of(matrices, torch.float32), Weights.of(exchanged, torch.float32)
    assert one.checksum != other.checksum
    data = bytearray(b"".join(one.chunks()))
    assert max(map(len, one.chunks())) <= CHUNK_BYTES
    assert Weights.from_bytes(data, family.expert_shapes[0], torch.float32).checksum == one.checksum
    assert one.gain_exponent() == family.load_local_experts(torch.float32).banks[1].gain_exponent(0)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_the_canary_finds_one_wrong_weight_of_any_matrix(family: SwigluFamily, name: str) -> None:
    async def test() -> None:
        async with serving(family) as old, serving(family, config=replace(CONFIG, shard_id="s1")) as new:
            loaded = await control_client.load(old.endpoint, dict.fromkeys(LAYERS, ALL))
            await control_client.load(new.endpoint, dict.fromkeys(LAYERS, ALL))
            experts = {1: [2, 5, 9], 3: [0]}
            ask = (old.endpoint, new.endpoint, experts, family.expert_shapes, torch.float32, loaded.gains)
            assert await control_client.canary(*ask) == []
            bank, wrong = new.host.on_device.banks[1], Weights.of(family.load_expert(1, 5), torch.float32)
            wrong = wrong.in_host_memory()  # the original is mapped from the checkpoint's file
            wrong.matrices[name].parts[0][WIDTH // 2, 3] *= -1
            bank.load(5, wrong.matrices)
            assert await control_client.canary(*ask) == [(1, 5)]

    run(test)
