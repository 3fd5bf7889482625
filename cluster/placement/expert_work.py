"""Expert work says what each expert of a layer adds to one step: MiB of weights to read, and rows to compute.

Legend: E: the experts of the layer. C = 2: the components of work (`cluster.placement.balance`).
"""

from __future__ import annotations

import numpy as np

from cluster.load import ExpectedLoad
from cluster.placement.balance import Floats
from cluster.topology import LayerSpec

MIB = 2**20


def pick_probabilities(spec: LayerSpec, load: ExpectedLoad | None, risk: float) -> tuple[Floats, Floats]:
    """Return the expected probability that a row picks each expert, and a higher, cautious probability, both [E].

    The cautious probability assumes that an expert's load is `risk` standard deviations above its mean. If the load is
    None or 0, all experts are equally likely. Raises ValueError if the load does not have one finite number of at least
    0 for each expert.
    """
    if load is None:
        even_E = np.full(spec.num_experts, spec.top_k / spec.num_experts)
        return even_E, even_E
    if len(load.mean_E) != spec.num_experts or not (load.mean_E >= 0).all() or not np.isfinite(load.mean_E.sum()):
        raise ValueError(
            f"The load of layer {spec.layer} has {len(load.mean_E)} entries, the least {min(load.mean_E, default=0)}; "
            f"it needs {spec.num_experts} finite numbers, one for each expert, none below zero."
        )
    total = load.mean_E.sum()
    if total == 0:
        return pick_probabilities(spec, None, risk)
    scale = spec.top_k / total
    return np.minimum(1.0, scale * load.mean_E), np.minimum(1.0, scale * (load.mean_E + risk * load.std_E))


def expert_work(spec: LayerSpec, picked_E: Floats, rows_per_step: float) -> Floats:
    """Return the work of each expert in a step of `rows_per_step` rows, [E, C]: MiB read, and MiB times rows computed.

    If any row picks an expert, the expert's weights count as read once. If the expert has several homes, each home's
    part of this read is proportional to its rows. With few rows this count is right, because the backbone sends all
    rows of an expert to one home. With many rows, every home reads all weights, but then reading is a small part of the
    work.
    """
    size = spec.expert_bytes / MIB
    touched_E = -np.expm1(rows_per_step * np.log1p(-np.minimum(picked_E, 1 - 1e-12)))
    return size * np.stack([touched_E, rows_per_step * picked_E], axis=1)
