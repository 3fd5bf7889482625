"""How much work each expert of a layer causes in one step, from the expected load.

Legend: E experts of the layer, C = 2 components of work (`cluster.placement.balance`).
"""

from __future__ import annotations

import numpy as np

from cluster.load import ExpectedLoad
from cluster.placement.balance import Floats
from cluster.topology import LayerSpec

MIB = 2**20


def pick_probabilities(spec: LayerSpec, load: ExpectedLoad | None, risk: float) -> tuple[Floats, Floats]:
    """How likely a row picks each expert, as expected and with `risk` standard deviations more; [E] each."""
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
    """What a step of so many rows costs by expert, [E, C]: MiB of weights that it reads, MiB · rows that it computes.

    An expert's weights are read if any row picks it, once in all: the client keeps few rows of one expert together, so
    a second home shares the reading as it shares the rows. (With many rows both read them, which is then little.)
    """
    size = spec.expert_bytes / MIB
    touched_E = -np.expm1(rows_per_step * np.log1p(-np.minimum(picked_E, 1 - 1e-12)))
    return size * np.stack([touched_E, rows_per_step * picked_E], axis=1)
