"""These tests check that an `ExpertHost` holds experts within its budget, computes, and refuses invalid requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from model.exact_sums import gain_exponent
from model.families.registry import load_family
from model.family import ModelFamily
from model.stored_matrix import StoredMatrix
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.transport.wire import Refused
from services.expert.transport.worker import Worker
from services.expert.weights.host import ExpertHost
from services.expert.weights.load_order import ExpertsByLayer, LoadOrder
from services.expert.weights.loader import Loader
from services.expert.weights.promotion import Promoter
from services.expert.weights.transfer import ReadExpert, WeightSource
from tests.services.expert.checkpoint import LATENT, WIDTH, write_checkpoint
from tests.services.expert.requests import make_request

EXPERT_BYTES = 2 * LATENT * WIDTH * 4


class FilledHost(ExpertHost):
    """A `FilledHost` is an `ExpertHost` that can load experts without a shard. No request may be computed meanwhile."""

    def __init__(self, family: ModelFamily, num_experts: int) -> None:
        super().__init__(family.expert_shapes, torch.float32, torch.device("cpu"), num_experts * EXPERT_BYTES)
        self.read: ReadExpert = family.load_expert

    def load(self, homes: ExpertsByLayer, standby: ExpertsByLayer | None = None) -> None:
        async def load() -> None:
            worker = Worker(9, "filling")
            try:
                source = WeightSource(self, self.read)
                loader = Loader(self, worker, source, Promoter(self, worker, source))
                await loader.load(LoadOrder(homes, standby or {}))
            finally:
                await asyncio.to_thread(worker.close)

        asyncio.run(load())


def make_host(family: ModelFamily, num_experts: int = 100) -> FilledHost:
    return FilledHost(family, num_experts)


def test_it_starts_empty_and_counts_what_it_holds(family: ModelFamily) -> None:
    host = make_host(family)
    assert (host.held, host.used_bytes) == ({}, 0)
    empty = host.digest
    host.load({1: [3, 1, 3], 3: [0]})
    host.load({1: [1]})
    assert (host.held, host.num_held, host.used_bytes) == ({1: [1, 3], 3: [0]}, 3, 3 * EXPERT_BYTES)
    host.unload({1: [1, 3, 9], 3: [0]}, {})
    assert (host.held, host.used_bytes, host.digest) == ({}, 0, empty)


def test_partial_sums_of_two_hosts_add_up_to_the_whole(family: ModelFamily) -> None:
    one, other, both = make_host(family), make_host(family), make_host(family)
    one.load({1: [0]})
    other.load({1: [1]})
    both.load({1: [0, 1]})
    parts = [host.compute(make_request(experts)) for host, experts in ((one, (0,)), (other, (1,)))]
    whole = both.compute(make_request((0, 1)))
    as_tensor = [torch.frombuffer(bytearray(sums.data), dtype=torch.int32) for sums in (*parts, whole)]
    assert torch.equal(as_tensor[0] + as_tensor[1], as_tensor[2])


def test_a_layer_with_an_outlier_is_logged_once(family: ModelFamily, caplog: pytest.LogCaptureFixture) -> None:
    def read(layer: int, expert: int) -> dict[str, StoredMatrix]:
        matrices = dict(family.load_expert(layer, expert))
        if (layer, expert) == (3, 5):
            matrices["up"] = StoredMatrix.plain(16 * matrices["up"].parts[0])
        return matrices

    host = make_host(family)
    host.read = read
    host.load({1: [0, 1, 2, 3], 3: [4, 6, 7]}, {3: [8]})
    assert caplog.messages == []
    host.load({3: [5]})
    host.load({3: [9]})
    [message] = caplog.messages
    assert message.startswith("The outputs of one expert of layer 3 may be 2**8 times as large")


def test_gains_are_the_largest_of_the_held_experts(family: ModelFamily) -> None:
    def read(layer: int, expert: int) -> dict[str, StoredMatrix]:
        up, down = family.load_expert(layer, expert).values()
        return {"up": StoredMatrix.plain(2.0 ** (expert % 4) * up.parts[0]), "down": down}

    def largest(*experts: int) -> dict[int, int]:
        return {3: max(gain_exponent(read(3, expert)) for expert in experts)}

    host = make_host(family)
    host.read = read
    assert host.gains([1, 3]) == {}
    host.load({3: [0, 7, 3]}, {3: [5]})
    assert host.gains([1, 3]) == largest(0, 3, 5, 7)
    host.load({3: [0, 3]}, {3: [7]})
    host.unload({3: [3]}, {3: [7]})
    assert host.gains([1, 3]) == largest(0, 5) != largest(0, 5, 7)
    host.unload({3: [0]}, {3: [5]})
    assert host.gains([1, 3]) == {}


def test_more_than_the_budget_is_refused_with_the_numbers(family: ModelFamily) -> None:
    host = make_host(family, num_experts=2)
    host.load({1: [0]})
    with pytest.raises(
        ValueError, match=rf"{2 * EXPERT_BYTES} bytes more than the {EXPERT_BYTES} in use, over a budget"
    ):
        host.load({1: [0, 1, 2]})
    assert host.held == {1: [0]}


@pytest.mark.parametrize(
    ("experts", "sentence"),
    [
        ({2: [0]}, r"Layer 2 has no routed experts; the layers that have them are \[1, 3\]."),
        ({1: [31, 32]}, r"Layer 1 has no experts \[32\]; its experts are 0 to 31."),
    ],
)
def test_what_does_not_exist_is_refused(experts: dict[int, list[int]], sentence: str, family: ModelFamily) -> None:
    host = make_host(family)
    with pytest.raises(ValueError, match=sentence):
        host.load(experts)
    with pytest.raises(ValueError, match=sentence):
        host.unload(experts, {})


def test_a_missing_tensor_is_named_and_nothing_is_held(tmp_path: Path) -> None:
    missing = "backbone.layers.3.mixer.experts.5.up_proj.weight"
    host = make_host(load_family(write_checkpoint(tmp_path, without=missing)))
    host.load({3: [4]})
    with pytest.raises(ValueError, match=missing):
        host.load({1: [0, 1], 3: [4, 5]})
    assert host.held == {3: [4]}
    assert {layer: set(bank.held) for layer, bank in host.on_device.banks.items()} == {1: set(), 3: {4}}


def test_a_layer_without_experts_is_a_bad_shape(family: ModelFamily) -> None:
    with pytest.raises(Refused, match=r"layer is 2, but the layers with routed experts are \[1, 3\]."):
        make_host(family).compute(make_request(layer=2))


def test_another_dtype_than_the_host_computes_in_is_refused(family: ModelFamily) -> None:
    with pytest.raises(Refused, match=r"dtype is torch.bfloat16, but this shard computes in torch.float32."):
        make_host(family).compute(make_request(dtype=pb.DTYPE_BF16))


def test_experts_that_are_not_held_are_named(family: ModelFamily) -> None:
    host = make_host(family)
    host.load({1: [0]})
    with pytest.raises(Refused, match=r"Experts \[1, 2\] of layer 1 are not held here.") as refused:
        host.compute(make_request((2, 0, 1)))
    assert (refused.value.code, refused.value.missing) == (pb.Refusal.NOT_HOSTED, (1, 2))


def test_an_old_epoch_is_told_so_only_where_it_matters(family: ModelFamily) -> None:
    host = make_host(family)
    host.load({1: [0, 1]})
    host.epoch = 5
    assert host.compute(make_request((0, 1), epoch=4)).width
    host.unload({1: [1]}, {})
    with pytest.raises(Refused, match="any more: the epoch of the request is 4, of this shard 5") as refused:
        host.compute(make_request((0, 1), epoch=4))
    assert refused.value.code == pb.Refusal.STALE_EPOCH
