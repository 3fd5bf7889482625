"""These tests load and verify weights from another shard (the peer) or the checkpoint, and bound bytes in flight."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.control.manifest import Manifest
from model import kernels
from model.configs.weight_format import WeightFormat, stored_parts
from model.encoder import encode_tensors
from model.exact_sums import gain_exponent
from model.families.registry import load_family
from model.family import ModelFamily
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from protos.expertmesh.expert.v1 import expert_pb2_grpc
from services.expert import control_client
from services.expert.shard import ExpertShard
from services.expert.weights import transfer
from services.expert.weights.load_order import Sources
from services.expert.weights.loader import LOADS_AT_ONCE
from services.expert.weights.transfer import ByteBudget, PeerChannels, PeerError, fetch
from services.expert.weights.weights import CHUNK_BYTES, Weights, matrix_formats
from tests.services.expert.checkpoint import LATENT, NUM_EXPERTS, WIDTH, write_checkpoint
from tests.services.expert.proxy import Damage, cut_at, flip_at, proxy_to
from tests.services.expert.requests import make_request
from tests.services.expert.serving import CONFIG, ask, run, serving
from tests.services.expert.shard_process import ShardProcess

ONE = 2 * LATENT * WIDTH * 4
ALL = list(range(NUM_EXPERTS))
IN_EXPERT = 20_000  # in a connection's data, the byte at this position belongs to the first expert
DAMAGED = "its bytes are damaged or another checkpoint's"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no fetch fail because a busy machine stalls for seconds."""
    monkeypatch.setattr(transfer, "FETCH_STALL_S", 30.0)


def without(tmp_path: Path, expert: int) -> ModelFamily:
    """Write a checkpoint that lacks one tensor of the expert `expert` of layer 1, and return its model family."""
    return load_family(
        write_checkpoint(tmp_path / "lacking", f"backbone.layers.1.mixer.experts.{expert}.up_proj.weight")
    )


@asynccontextmanager
async def two(
    family: ModelFamily, shard_family: ModelFamily | None = None
) -> AsyncIterator[tuple[ExpertShard, ExpertShard]]:
    """Serve two shards: a peer that is home or standby of all experts of layer 1, and a shard that holds no expert.

    The peer reads the checkpoint of `family`. The other shard reads the checkpoint of `shard_family`, or of `family` if
    `shard_family` is None.
    """
    async with (
        serving(family, config=replace(CONFIG, host_budget=8 * ONE)) as peer,
        serving(shard_family or family, config=replace(CONFIG, shard_id="s1")) as shard,
    ):
        await control_client.load(peer.endpoint, {1: ALL[:16]}, 1, {1: ALL[16:]})
        yield peer, shard


def same_weights(one: ExpertShard, other: ExpertShard, expert: int) -> bool:
    return Weights(one.host.on_device.banks[1].matrices(expert)).checksum == (
        Weights(other.host.on_device.banks[1].matrices(expert)).checksum
    )


def from_peer(endpoint: str, *experts: int, **expected: Any) -> Sources:
    return Sources({(1, expert): endpoint for expert in experts}, **expected)


def test_every_tier_of_a_peer_gives_the_bytes_that_it_loaded(family: ModelFamily) -> None:
    async def test() -> None:
        async with two(family) as (peer, shard):
            shard.service.source.read = lambda layer, expert: pytest.fail("the checkpoint was read")
            loaded = await control_client.load(shard.endpoint, {1: ALL}, 1, sources=from_peer(peer.endpoint, *ALL))
            assert shard.host.held == {1: ALL}
            assert all(same_weights(peer, shard, expert) for expert in ALL[:16])
            known = {expert: peer.host.metadata((1, expert)) for expert in ALL}
            assert loaded.checksums[1] == {expert: of.checksum for expert, of in known.items() if of}
            assert loaded.gains == peer.host.gains({1: []})
            assert (shard.service.source.incoming.used_bytes, peer.service.outgoing.used_bytes) == (0, 0)

    run(test)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_are_bounded_and_the_last_one_has_the_checksum(family: ModelFamily, dtype: torch.dtype) -> None:
    async def test() -> None:
        async with serving(family, config=replace(CONFIG, dtype=dtype)) as shard:
            loaded = await control_client.load(shard.endpoint, {3: [4]}, 1, {3: [9]})
            async with grpc.aio.insecure_channel(shard.endpoint) as channel:
                stub: Any = expert_pb2_grpc.ExpertStub(channel)  # type: ignore[no-untyped-call]
                matrices = matrix_formats(shard.host.shapes[3], dtype)
                request = pb.FetchRequest(layer=3, experts=[9, 4], matrices=matrices)
                chunks = [chunk async for chunk in stub.Fetch(request)]
            assert max(len(chunk.data) for chunk in chunks) <= CHUNK_BYTES
            for expert in (4, 9):
                of_expert = [chunk for chunk in chunks if chunk.expert == expert]
                data = bytearray(b"".join(chunk.data for chunk in of_expert))
                assert [chunk.is_last for chunk in of_expert] == [False] * (len(of_expert) - 1) + [True]
                weights = Weights.from_bytes(data, shard.host.shapes[3], dtype)
                assert weights.checksum == of_expert[-1].checksum == loaded.checksums[3][expert]
                assert of_expert[-1].gain_exponent == weights.gain_exponent()
                raw = family.load_expert(3, expert)
                for name in ("up", "down"):
                    assert torch.equal(weights.matrices[name].parts[0], raw[name].parts[0].to(dtype))

    run(test)


def quantized_family(model_dir: Path, path: Path, up: WeightFormat, down: WeightFormat) -> ModelFamily:
    """Write the checkpoint in `model_dir` with quantized experts to `path`, and return its family."""
    tensors, by_matrix = load_file(model_dir / "model.safetensors"), {"up": up, "down": down}
    stems = {name.removesuffix(".weight") for name in tensors if ".experts." in name}
    chosen = {stem: by_matrix[stem.rpartition(".")[2].removesuffix("_proj")] for stem in stems}
    save_file(encode_tensors(tensors, chosen), path / "model.safetensors")
    shutil.copy(model_dir / "config.json", path)
    return load_family(path)


@pytest.mark.parametrize(
    "formats", [("fp8", "fp8"), ("fp8_blocks", "fp8_blocks"), ("nvfp4", "nvfp4"), ("fp8", "nvfp4")], ids=str
)
def test_every_tier_of_a_peer_sends_the_stored_bytes(
    model_dir: Path, tmp_path: Path, formats: tuple[WeightFormat, WeightFormat]
) -> None:
    """Check that a peer sends a quantized expert as the checkpoint stores it, from the device, memory or disk."""
    by_matrix, by_expert = dict(zip(("up", "down"), formats, strict=True)), {}
    family = quantized_family(model_dir, tmp_path, *formats)
    encoded = load_file(tmp_path / "model.safetensors")
    for expert in ALL:
        modules = [(f"backbone.layers.1.mixer.experts.{expert}.{name}_proj", name) for name in by_matrix]
        names = [f"{stem}.{part.suffix}" for stem, name in modules for part in stored_parts(by_matrix[name], 1, 16)]
        by_expert[expert] = b"".join(encoded[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in names)
    size = len(by_expert[0])
    config = replace(CONFIG, host_budget=8 * size)

    async def test() -> None:
        async with serving(family, config=config) as peer, serving(family, config=replace(CONFIG, shard_id="s1")) as s1:
            known = await control_client.load(peer.endpoint, {1: ALL[:16]}, 1, {1: ALL[16:]})
            assert (peer.host.used_bytes, peer.host.standbys.used_bytes) == (16 * size, 8 * size)
            async with grpc.aio.insecure_channel(peer.endpoint) as channel:
                stub: Any = expert_pb2_grpc.ExpertStub(channel)  # type: ignore[no-untyped-call]
                matrices = matrix_formats(family.expert_shapes[0], torch.float32)
                request = pb.FetchRequest(layer=1, experts=ALL, matrices=matrices)
                sent = {expert: bytearray() for expert in ALL}
                async for chunk in stub.Fetch(request):
                    sent[chunk.expert] += chunk.data
            assert sent == by_expert
            s1.service.source.read = lambda layer, expert: pytest.fail("the checkpoint was read")
            loaded = await control_client.load(s1.endpoint, {1: ALL}, 1, sources=from_peer(peer.endpoint, *ALL))
            assert s1.host.used_bytes == len(ALL) * size
            assert Manifest(known.checksums).mismatches(loaded.checksums) == []
            assert loaded.gains == known.gains
            assert loaded.gains[1] == max(gain_exponent(family.load_expert(1, expert)) for expert in ALL)
            assert all(same_weights(peer, s1, expert) for expert in ALL[:16])

    run(test)


def test_a_shard_that_dequantizes_sends_the_stored_bytes_of_its_checkpoint(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a shard without the CPU kernels, which computes as a shard on a GPU does: with dequantized numbers only."""
    monkeypatch.setattr(kernels, "has_compiled", lambda: False)
    family = quantized_family(model_dir, tmp_path, "fp8", "nvfp4")
    stored_bytes = family.expert_shapes[0].nbytes(torch.float32)
    config = replace(CONFIG, memory_budget=8 * ONE, host_budget=8 * stored_bytes)

    async def test() -> None:
        async with serving(family, config=config) as peer, serving(family, config=config) as shard:
            known = await control_client.load(peer.endpoint, {1: [0, 1]}, 1, {1: [2]})
            assert (peer.host.used_bytes, peer.host.standbys.used_bytes) == (2 * ONE, stored_bytes)
            shard.service.source.read = lambda layer, expert: pytest.fail("the checkpoint was read")
            loaded = await control_client.load(
                shard.endpoint, {1: [0]}, 1, {1: [1, 2]}, from_peer(peer.endpoint, 0, 1, 2)
            )
            assert (loaded.checksums, loaded.gains) == (known.checksums, known.gains)
            assert (shard.host.used_bytes, shard.host.standbys.used_bytes) == (ONE, 2 * stored_bytes)
            await control_client.load(peer.endpoint, {}, 2, {1: [1]})
            for standby in map(peer.host.standbys.get, [(1, 1), (1, 2)]):
                assert standby is not None
                assert standby.weights is not None
                assert standby.weights.nbytes == stored_bytes
            with pytest.raises(control_client.ShardError, match="over a budget of"):
                await control_client.load(peer.endpoint, {1: ALL[:9]}, 3)

    run(test)


def stored(up: pb.StoredFormat, down: pb.StoredFormat, width: int = WIDTH) -> list[pb.MatrixFormat]:
    return [
        pb.MatrixFormat(name="up", rows=width, columns=LATENT, format=up),
        pb.MatrixFormat(name="down", rows=LATENT, columns=width, format=down),
    ]


FP32 = stored(pb.STORED_FORMAT_FP32, pb.STORED_FORMAT_FP32)
HERE = "This shard stores the experts of layer 1 as up FP32 128x64, down FP32 64x128, but the request is for"


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        (pb.FetchRequest(layer=1, experts=[0, 40], matrices=FP32), "NOT_FOUND", "Experts [40] of layer 1 are not here"),
        (pb.FetchRequest(layer=2, experts=[0], matrices=FP32), "NOT_FOUND", "Experts [0] of layer 2 are not here"),
        (pb.FetchRequest(layer=2, matrices=FP32), "NOT_FOUND", "Experts [] of layer 2 are not here"),
        (pb.FetchRequest(layer=1, experts=[0]), "FAILED_PRECONDITION", f"{HERE} no matrices."),
        (
            pb.FetchRequest(layer=1, experts=[0], matrices=stored(pb.STORED_FORMAT_BF16, pb.STORED_FORMAT_BF16)),
            "FAILED_PRECONDITION",
            f"{HERE} up BF16 128x64, down BF16 64x128.",
        ),
        (
            pb.FetchRequest(layer=1, experts=[0], matrices=stored(pb.STORED_FORMAT_NVFP4, pb.STORED_FORMAT_FP32, 64)),
            "FAILED_PRECONDITION",
            f"{HERE} up NVFP4 64x64, down FP32 64x64.",
        ),
        (
            pb.FetchRequest(layer=1, experts=[0], matrices=FP32[::-1]),
            "FAILED_PRECONDITION",
            f"{HERE} down FP32 64x128, up FP32 128x64.",
        ),
    ],
)
def test_what_a_shard_cannot_give_is_a_sentence(
    request_: pb.FetchRequest, code: str, sentence: str, family: ModelFamily
) -> None:
    async def test() -> None:
        async with two(family) as (peer, _), grpc.aio.insecure_channel(peer.endpoint) as channel:
            stub: Any = expert_pb2_grpc.ExpertStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError, match=re.escape(sentence)) as raised:
                [chunk async for chunk in stub.Fetch(request_)]
            assert raised.value.code().name == code

    run(test)


def test_a_peer_with_another_dtype_is_replaced_by_the_checkpoint(family: ModelFamily) -> None:
    async def test() -> None:
        async with two(family) as (peer, _), serving(family, config=replace(CONFIG, dtype=torch.bfloat16)) as shard:
            await control_client.load(shard.endpoint, {1: [0, 1]}, 1, sources=from_peer(peer.endpoint, 0, 1))
            for expert in (0, 1):
                held, raw = shard.host.on_device.banks[1].matrices(expert), family.load_expert(1, expert)
                for name in ("up", "down"):
                    assert torch.equal(held[name].parts[0], raw[name].parts[0].to(torch.bfloat16))
            assert peer.service.outgoing.used_bytes == 0
            with pytest.raises(PeerError, match=re.escape(f"{HERE} up BF16 128x64, down BF16 64x128.")):
                async with PeerChannels() as peers:
                    await fetch(peers[peer.endpoint], shard.host.shapes[1], 0, torch.bfloat16)

    run(test)


@pytest.mark.parametrize("damage", [flip_at(IN_EXPERT), cut_at(IN_EXPERT), cut_at(0)], ids=["flip", "cut", "refuse"])
def test_a_peer_that_fails_is_replaced_by_the_checkpoint(family: ModelFamily, damage: Damage) -> None:
    async def test() -> None:
        async with two(family) as (peer, shard), proxy_to(peer.endpoint, damage) as endpoint:
            loaded = await control_client.load(shard.endpoint, {1: [0, 1, 2]}, 1, sources=from_peer(endpoint, 0, 1, 2))
            assert shard.host.held == {1: [0, 1, 2]}
            assert all(same_weights(peer, shard, expert) for expert in (0, 1, 2))
            assert len(loaded.checksums[1]) == 3

    run(test)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(flip_at(IN_EXPERT), "its bytes have the checksum"), (cut_at(IN_EXPERT), "it answered|it ended after")],
    ids=["flip", "cut"],
)
def test_where_both_fail_the_expert_is_named_and_not_held(
    family: ModelFamily, tmp_path: Path, damage: Damage, sentence: str
) -> None:
    async def test() -> None:
        own = without(tmp_path, 5)
        async with two(family, own) as (peer, shard), proxy_to(peer.endpoint, damage) as endpoint:
            await control_client.load(shard.endpoint, {1: [1]})
            with pytest.raises(control_client.ShardError, match="Expert 5 of layer 1 was not loaded") as error:
                await control_client.load(shard.endpoint, {1: [5]}, 1, sources=from_peer(endpoint, 5))
            error.match(sentence)
            error.match("experts.5.up_proj.weight")
            assert (shard.host.held, shard.host.used_bytes, shard.host.on_device.banks[1].held) == ({1: [1]}, ONE, {1})

    run(test)


def test_a_peer_has_what_the_checkpoint_lacks(family: ModelFamily, tmp_path: Path) -> None:
    async def test() -> None:
        async with two(family, without(tmp_path, 5)) as (peer, shard):
            with pytest.raises(control_client.ShardError, match=r"experts.5.up_proj.weight"):
                await control_client.load(shard.endpoint, {1: [5]})
            await control_client.load(shard.endpoint, {1: [5]}, 1, sources=from_peer(peer.endpoint, 5))
            assert same_weights(peer, shard, 5)

    run(test)


def test_a_hung_peer_costs_one_stall(family: ModelFamily, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FETCH_STALL_S", 2.0)
    num_asked, fetch_one = 0, transfer.fetch

    async def count(*arguments: Any) -> Weights:
        nonlocal num_asked
        num_asked += 1
        return await fetch_one(*arguments)

    monkeypatch.setattr(transfer, "fetch", count)

    async def test() -> None:
        with ShardProcess(model_dir) as process:
            [peer] = process.shards
            await control_client.load(peer.endpoint, {1: ALL})
            os.kill(process.process.pid, signal.SIGSTOP)
            async with serving(family) as shard:
                await control_client.load(shard.endpoint, {1: ALL}, sources=from_peer(peer.endpoint, *ALL))
                assert shard.host.held == {1: ALL}
                assert 1 <= num_asked <= LOADS_AT_ONCE  # these fetches wait at the same time, and no other follows

    run(test)


def test_a_peer_that_is_killed_meanwhile_is_replaced_by_the_checkpoint(family: ModelFamily, model_dir: Path) -> None:
    async def test() -> None:
        with ShardProcess(model_dir) as process:
            [peer] = process.shards
            await control_client.load(peer.endpoint, {1: ALL, 3: ALL})
            num_seen = 0

            def kill_after_three(data: bytes, before: int) -> bytes:
                nonlocal num_seen
                num_seen = before
                if before > 3 * ONE:
                    process.process.kill()
                return data

            async with serving(family) as shard, proxy_to(peer.endpoint, kill_after_three) as endpoint:
                peers = {(layer, expert): endpoint for layer in (1, 3) for expert in ALL}
                await control_client.load(shard.endpoint, {1: ALL, 3: ALL}, sources=Sources(peers))
                assert shard.host.held == {1: ALL, 3: ALL}
                assert 3 * ONE < num_seen < 40 * ONE
                raw = family.load_expert(3, 31)
                held = shard.host.on_device.banks[3].matrices(31)
                assert torch.equal(held["up"].parts[0], raw["up"].parts[0])

    run(test)


def damaged(tmp_path: Path, model_dir: Path, family: ModelFamily, expert: int) -> ModelFamily:
    """Copy the checkpoint and change the sign of one weight of `expert` in layer 1; return the copy's model family."""
    path = Path(shutil.copytree(model_dir, tmp_path / "damaged")) / "model.safetensors"
    weights, data = family.load_expert(1, expert)["up"].parts[0], bytearray(path.read_bytes())
    data[data.index(weights.numpy().tobytes()) + 1003] ^= 0x80
    path.write_bytes(data)
    return load_family(path.parent)


def test_other_bytes_than_the_manifest_has_are_not_taken(family: ModelFamily, model_dir: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with two(family, damaged(tmp_path, model_dir, family, 7)) as (peer, shard):
            right = await control_client.load(peer.endpoint, {1: [6, 7]})
            manifest = Manifest(right.checksums)
            expected = {(1, expert): checksum for expert, checksum in manifest.known[1].items()}
            for homes, standby in (({1: [6, 7]}, {}), ({}, {1: [7]})):
                with pytest.raises(control_client.ShardError, match=f"Expert 7 of layer 1 was not loaded .*{DAMAGED}"):
                    await control_client.load(shard.endpoint, homes, 1, standby, Sources(expected=expected))
                assert (shard.host.held, shard.host.standby, shard.host.used_bytes) == ({}, {}, 0)
            unchecked = await control_client.load(shard.endpoint, {1: [6, 7]})
            assert [(of.layer, of.expert) for of in manifest.mismatches(unchecked.checksums)] == [(1, 7)]
            with pytest.raises(
                control_client.ShardError, match=r"Expert 7 of layer 1 is here with .*have it unloaded first"
            ):
                await control_client.load(shard.endpoint, {1: [7]}, sources=Sources(expected=expected))
            await control_client.unload(shard.endpoint, {1: [7]}, 2)
            await control_client.load(
                shard.endpoint, {1: [7]}, 3, sources=from_peer(peer.endpoint, 7, expected=expected)
            )
            assert same_weights(peer, shard, 7)

    run(test)


def test_a_checkpoint_that_changes_under_a_standby_is_noticed(model_dir: Path, tmp_path: Path) -> None:
    async def test() -> None:
        path = Path(shutil.copytree(model_dir, tmp_path / "own")) / "model.safetensors"
        own = load_family(path.parent)
        async with serving(own) as shard:
            await control_client.load(shard.endpoint, {1: [0]}, 1, {1: [7]})
            place = path.read_bytes().index(own.load_expert(1, 7)["up"].parts[0].numpy().tobytes())
            with path.open("r+b") as file:
                file.seek(place + 1000)
                file.write(b"\xff\xff\xff\xff")
            refusal = (await ask(shard, make_request((0, 7))))[1].refusal
            assert (refusal.code, list(refusal.missing)) == (pb.Refusal.NOT_HOSTED, [7])
            assert DAMAGED in refusal.detail
            with path.open("r+b") as file:
                file.truncate(1000)
            refusal = (await ask(shard, make_request((0, 7))))[1].refusal
            assert "1000 bytes" in refusal.detail
            with pytest.raises(
                control_client.ShardError, match=r"Expert 9 of layer 1 was not loaded .* must not change"
            ):
                await control_client.load(shard.endpoint, {1: [9]})
            assert shard.host.held == {1: [0]}

    run(test)


def test_a_byte_budget_is_kept_in_turn() -> None:
    async def test() -> None:
        budget, order, highest = ByteBudget(100), [], 0

        async def hold(name: int, num_bytes: int) -> None:
            nonlocal highest
            async with budget.hold(num_bytes):
                order.append(name)
                highest = max(highest, budget.used_bytes)
                await asyncio.sleep(0.01)

        sizes = [60, 60, 30, 500, 10, 90]
        await asyncio.gather(*(hold(name, size) for name, size in enumerate(sizes)))
        assert (order, highest, budget.used_bytes) == (list(range(6)), 100, 0)

    run(test)
