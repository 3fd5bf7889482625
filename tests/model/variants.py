"""`VARIANTS` lists the tiny checkpoints of all families, and `write_variant` writes one of them.

The tests of the model run with every variant. The tests of the engine serve the variants in `SERVED`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.model import checkpoints, deepseek_checkpoints, qwen_checkpoints
from tests.model.checkpoints import Tiny

NEMOTRON, DEEPSEEK = tuple(checkpoints.VARIANTS), tuple(deepseek_checkpoints.VARIANTS)
QWEN = tuple(qwen_checkpoints.VARIANTS)
VARIANTS = (*NEMOTRON, *DEEPSEEK, *QWEN)
QUANTIZED = (*checkpoints.QUANTIZED, *deepseek_checkpoints.QUANTIZED, *qwen_checkpoints.QUANTIZED)
SERVED: tuple[tuple[str, torch.dtype], ...] = (  # with the dtype of the deployment
    *checkpoints.SERVED,
    ("deepseek", torch.bfloat16),
    ("deepseek_moonlight", torch.float32),
    ("deepseek_odd", torch.float32),
    ("deepseek_fp8", torch.float32),
    ("qwen", torch.bfloat16),
    ("qwen_sparse", torch.float32),
    ("qwen_odd", torch.float32),
    ("qwen_fp8", torch.float32),
)


def write_variant(path: Path, name: str, **changes: Any) -> Tiny:
    """Write the checkpoint of variant `name`, with `changes` to its config, to `path`.

    Every call with the same arguments writes the same weights.
    """
    if name in DEEPSEEK:
        return deepseek_checkpoints.write_deepseek(path, name, **changes)
    if name in QWEN:
        return qwen_checkpoints.write_qwen(path, name, **changes)
    return checkpoints.write_tiny(path, name, **changes)
