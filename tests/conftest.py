"""Without a GPU, the tests run Triton's kernels in Triton's interpreter, which computes on CPU tensors.

Triton reads TRITON_INTERPRET while it is imported, and a test's transformers may import Triton. So the variable must be
set before any test module is imported.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MAMBA_DETERMINISTIC"] = "1"  # mamba-ssm then skips its autotuner, which needs a GPU's driver
