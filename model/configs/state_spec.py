"""A `StateSpec` describes the tensors that requests need from one step to the next, before the tensors exist."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from model.configs.weight_format import NumberType

BLOCK_SIZE = 16  # number of tokens per page


@dataclass(frozen=True)
class PagedSpec:
    """A `PagedSpec` describes an attention layer's state: one tensor of `shape` per token, in the model's dtype."""

    layer: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RecurrentSpec:
    """A `RecurrentSpec` describes a recurrent layer's state: for each request, one tensor of each shape in `shapes`.

    `dtypes` has the dtype of each tensor: fp32, or the model's dtype.
    """

    layer: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Literal["float32", "model"], ...]


@dataclass(frozen=True)
class StateSpec:
    """A `StateSpec` describes the state of all layers, so that the engine can plan memory before allocating memory."""

    paged: tuple[PagedSpec, ...]
    recurrent: tuple[RecurrentSpec, ...]
    block_size: int = BLOCK_SIZE

    def bytes_per_block(self, dtype: NumberType) -> int:
        """Return the bytes of one page in all attention layers of a model with numbers of `dtype`."""
        return sum(prod(spec.shape) for spec in self.paged) * self.block_size * dtype.itemsize

    def bytes_per_slot(self, dtype: NumberType) -> int:
        """Return the bytes of one request's state in all recurrent layers of a model with numbers of `dtype`."""
        return sum(
            prod(shape) * (4 if own == "float32" else dtype.itemsize)
            for spec in self.recurrent
            for shape, own in zip(spec.shapes, spec.dtypes, strict=True)
        )

    def num_blocks(self, num_tokens: int) -> int:
        """Return the number of pages that one request with `num_tokens` tokens needs."""
        return -(-num_tokens // self.block_size)
