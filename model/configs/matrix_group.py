"""A `MatrixGroup` describes all weights of a model that have the same role and the same shape.

A role is the name of a module in the checkpoint without the module's place in the model. For example,
`backbone.layers.3.mixer.experts.7.up_proj` has the role `mixer.experts.up_proj`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

SCOPES = ("language_model", "backbone", "model", "layers", "mtp")  # first parts of a name, which are not in the role


@dataclass(frozen=True)
class MatrixGroup:
    """A `MatrixGroup` is `count` matrices of one role and one shape in a model; a vector is a matrix with one column.

    - `part` is the part of the model for which `expertmesh size` adds up parameters, for example "routed".
    - `role` tells how the matrices are stored, as all matrices of one role have the same place in a layer.
    - `is_mtp` is True for the weights of the MTP module.
    """

    part: str
    role: str
    rows: int
    columns: int = 1
    count: int = 1
    is_mtp: bool = False

    @property
    def num_params(self) -> int:
        """Return the number of parameters of all `count` matrices."""
        return self.rows * self.columns * self.count


def merge(found: Iterable[MatrixGroup]) -> tuple[MatrixGroup, ...]:
    """Return `found` with one entry for all matrices of the same role and shape, in the order of first appearance."""
    counts: Counter[MatrixGroup] = Counter()
    for one in found:
        counts[replace(one, count=1)] += one.count
    return tuple(replace(one, count=count) for one, count in counts.items() if count)


def role_of(tensor: str, num_layers: int) -> tuple[str, bool]:
    """Return the role of a tensor or of a module, and True if the MTP module has it.

    The MTP module's layers are called `mtp.` or have numbers from `num_layers`, the number of the other layers.
    """
    parts = tensor.removesuffix(".weight").split(".")
    is_mtp = False
    while len(parts) > 1 and (parts[0] in SCOPES or parts[0].isdigit()):
        is_mtp |= parts[0] == "mtp" or (parts[0].isdigit() and int(parts[0]) >= num_layers)
        parts.pop(0)
    return ".".join(part for part in parts if not part.isdigit()), is_mtp


def gated_mlp(part: str, module: str, hidden_size: int, width: int, count: int = 1) -> tuple[MatrixGroup, ...]:
    """Return the matrices of `count` gated MLPs whose module is called `module`."""
    return (
        MatrixGroup(part, f"{module}.gate_proj", width, hidden_size, count),
        MatrixGroup(part, f"{module}.up_proj", width, hidden_size, count),
        MatrixGroup(part, f"{module}.down_proj", hidden_size, width, count),
    )
