"""What a shard holds, and the arithmetic on it: no network, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.topology import held_digest
from model.moe import ExpertBank, ExpertShape
from protos.expertmesh.expert.v1 import expert_pb2 as pb
from services.expert.dispatch import warm_up
from services.expert.wire import TORCH_DTYPES, Picks, Refused, checked_body, picks_from_proto, sums_to_proto

Wanted = dict[int, list[int]]  # experts by layer
Read = Callable[[int, int], Mapping[str, Tensor]]  # (layer, expert) -> its tensors; ValueError names what is missing


class ExpertHost:
    """The experts in one process, by layer: empty at first, counted against a memory budget.

    `compute` and `remove` belong to one thread, `load` to one at a time; the rest may be asked from any.
    """

    def __init__(
        self, shapes: Iterable[ExpertShape], read: Read, dtype: torch.dtype, device: torch.device, memory_budget: int
    ) -> None:
        self.shapes = {shape.layer: shape for shape in shapes}
        self.banks = {layer: ExpertBank(shape, dtype, device) for layer, shape in self.shapes.items()}
        self.dtype, self.device, self.memory_budget = dtype, device, memory_budget
        self.epoch = 0
        self._read = read
        warm_up()
        self._is_held: dict[int, NDArray[np.bool_]] = {
            layer: np.zeros(shape.num_experts, dtype=np.bool_) for layer, shape in self.shapes.items()
        }

    @property
    def held(self) -> Wanted:
        """The experts held, by layer; layers without one are left out."""
        held = {layer: is_held.nonzero()[0].tolist() for layer, is_held in self._is_held.items()}
        return {layer: experts for layer, experts in held.items() if experts}

    @property
    def num_held(self) -> int:
        return sum(int(is_held.sum()) for is_held in self._is_held.values())

    @property
    def used_bytes(self) -> int:
        return sum(int(self._is_held[layer].sum()) * shape.nbytes(self.dtype) for layer, shape in self.shapes.items())

    @property
    def digest(self) -> str:
        return held_digest(self.held)

    def load(self, wanted: Wanted) -> None:
        """Reads from the checkpoint what is not held yet, all or nothing, while `compute` goes on.

        Raises ValueError where an expert does not exist or does not fit, or where the checkpoint lacks a tensor.
        """
        missing = self._missing(wanted)
        try:
            for layer, experts in missing.items():
                for expert in experts:
                    self.banks[layer].load(expert, self._read(layer, expert))
                self.banks[layer].warm_up()  # now, so that no request waits for it
        except BaseException:
            self._forget(missing)
            raise
        for layer, experts in missing.items():
            self._is_held[layer][experts] = True

    def remove(self, wanted: Wanted) -> None:
        """Lets experts go; those that are not held are passed over. ValueError where one does not exist."""
        self._check_exists(wanted)
        for layer, experts in wanted.items():
            self._is_held[layer][experts] = False
        self._forget(wanted)

    def _missing(self, wanted: Wanted) -> Wanted:
        self._check_exists(wanted)
        by_layer = {layer: sorted(set(experts) - set(self.held.get(layer, ()))) for layer, experts in wanted.items()}
        missing = {layer: experts for layer, experts in by_layer.items() if experts}
        num_bytes = sum(len(experts) * self.shapes[layer].nbytes(self.dtype) for layer, experts in missing.items())
        if self.used_bytes + num_bytes > self.memory_budget:
            numbers = f"{num_bytes} bytes more than the {self.used_bytes} in use, over a budget of {self.memory_budget}"
            raise ValueError(f"The experts asked for need {numbers}; raise memory_budget or place fewer here.")
        return missing

    def _forget(self, unwanted: Wanted) -> None:
        for layer, experts in unwanted.items():
            for expert in self.banks[layer].held.intersection(experts):
                self.banks[layer].unload(expert)

    def gains(self, layers: Iterable[int]) -> dict[int, int]:
        """The largest gain exponent of the experts held, by layer."""
        held = {layer: self._is_held[layer].nonzero()[0].tolist() for layer in layers}
        return {la: max(self.banks[la].gain_exponent(expert) for expert in held[la]) for la in held if held[la]}

    def compute(self, request: pb.ComputeRequest) -> pb.Sums:
        """The partial sum of each row over its picks; raises Refused."""
        picks, bank = self._decode(request), self.banks[request.layer]
        self._check_held(request, picks.expert_P)
        if bank.is_compiled:
            sums_NL = bank.packed_sums(picks.x_NL, picks.row_P, picks.expert_P, picks.weight_P, picks.grid_N)
        else:
            sums_NL = bank.partial_sums(*self._as_tensors(picks)).cpu().numpy()
        return sums_to_proto(sums_NL)

    def _as_tensors(self, picks: Picks) -> tuple[Tensor, ...]:
        x_NL = torch.from_numpy(picks.x_NL.copy())  # copies, because torch warns about read-only memory
        x_NL = x_NL.view(torch.bfloat16) if self.dtype == torch.bfloat16 else x_NL
        row_P, expert_P = (torch.from_numpy(ids.astype(np.int64)) for ids in (picks.row_P, picks.expert_P))
        weight_P, grid_N = (torch.from_numpy(numbers.copy()) for numbers in (picks.weight_P, picks.grid_N))
        return x_NL.to(self.device), row_P, expert_P, weight_P, grid_N

    def _decode(self, request: pb.ComputeRequest) -> Picks:
        body = checked_body(request)
        shape = self.shapes.get(request.layer)
        if shape is None:
            detail = f"layer is {request.layer}, but the layers with routed experts are {sorted(self.shapes)}."
            raise Refused(pb.Refusal.BAD_SHAPE, detail)
        if TORCH_DTYPES.get(request.dtype, self.dtype) != self.dtype:
            detail = f"dtype is {TORCH_DTYPES[request.dtype]}, but this shard computes in {self.dtype}."
            raise Refused(pb.Refusal.BAD_SHAPE, detail)
        return picks_from_proto(request, body, shape.input_dim, shape.num_experts)

    def _check_held(self, request: pb.ComputeRequest, expert_P: NDArray[np.int32]) -> None:
        is_held_P = self._is_held[request.layer][expert_P]
        if is_held_P.all():
            return
        missing = tuple(np.unique(expert_P[~is_held_P]).tolist())
        what = f"Experts {list(missing)} of layer {request.layer} are not held here"
        if request.epoch < self.epoch:
            detail = f"{what} any more: the request is of epoch {request.epoch}, this shard of {self.epoch}."
            raise Refused(pb.Refusal.STALE_EPOCH, detail, missing)
        raise Refused(pb.Refusal.NOT_HOSTED, f"{what}.", missing)

    def _check_exists(self, wanted: Wanted) -> None:
        for layer, experts in wanted.items():
            if layer not in self.shapes:
                known = sorted(self.shapes)
                raise ValueError(f"Layer {layer} has no routed experts; the layers that have them are {known}.")
            end = self.shapes[layer].num_experts
            if wrong := [expert for expert in experts if not 0 <= expert < end]:
                raise ValueError(f"Layer {layer} has no experts {wrong}; its experts are 0 to {end - 1}.")
