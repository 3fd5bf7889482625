"""An `ExpertShape` holds the sizes, the arithmetic and the weight formats of one MoE layer's routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from model.configs.weight_format import NumberType, WeightFormat, matrix_bytes

# What an expert computes from an input x:
#   relu2:  down·relu(up·x)²
#   swiglu: down·(silu(gate·x)·(up·x))
ExpertKind = Literal["relu2", "swiglu"]
MATRIX_NAMES: dict[ExpertKind, tuple[str, ...]] = {"relu2": ("up", "down"), "swiglu": ("gate", "up", "down")}


@dataclass(frozen=True)
class MatrixShape:
    """A `MatrixShape` holds the name, the sizes and the weight format of one matrix of an expert."""

    name: str
    rows: int
    columns: int
    format: WeightFormat

    def nbytes(self, plain: NumberType) -> int:
        """Return the matrix's size in bytes if plain numbers have the type `plain`."""
        return matrix_bytes(self.format, self.rows, self.columns, plain)


@dataclass(frozen=True)
class ExpertShape:
    """An `ExpertShape` holds the sizes of one MoE layer's routed experts.

    - `formats` has the weight format of each of an expert's `matrices`, in order; () stands for plain matrices.
    - The router divides the experts, in order, into `num_groups` groups of equal size. A token's experts all come from
      at most `top_groups` of these groups. A router without groups has one group.
    """

    layer: int
    num_experts: int  # E
    top_k: int  # K
    input_dim: int  # L
    width: int  # M
    kind: ExpertKind = "relu2"
    formats: tuple[WeightFormat, ...] = ()
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        assert self.num_experts % self.num_groups == 0
        assert 1 <= self.top_groups <= self.num_groups
        assert len(self.formats) in (0, len(MATRIX_NAMES[self.kind]))

    @cached_property
    def matrices(self) -> tuple[MatrixShape, ...]:
        """Return the matrices of one expert in the order in which they are stored, sent and hashed."""
        names = MATRIX_NAMES[self.kind]
        sizes = {"gate": (self.width, self.input_dim), "up": (self.width, self.input_dim)}
        sizes["down"] = (self.input_dim, self.width)
        plain: WeightFormat = "plain"
        formats = self.formats or (plain,) * len(names)
        return tuple(MatrixShape(name, *sizes[name], format) for name, format in zip(names, formats, strict=True))

    @property
    def num_params(self) -> int:
        """Return the number of parameters of one expert."""
        return len(self.matrices) * self.input_dim * self.width

    def nbytes(self, plain: NumberType) -> int:
        """Return the size in bytes of one expert's weights if plain numbers have the type `plain`."""
        return sum(matrix.nbytes(plain) for matrix in self.matrices)
