"""The settings here must be made before any test module is imported.

- Without a GPU, the tests run Triton's kernels in Triton's interpreter, which computes on CPU tensors. Triton reads
  TRITON_INTERPRET while it is imported, and a test's transformers may import Triton.
- `model.cpu` sets the folder in which numba keeps compiled kernels. numba reads the setting while a module with kernels
  is imported. Without the setting, numba would compile the planner once more for another folder.
"""

from __future__ import annotations

import os

import torch

import model.cpu  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MAMBA_DETERMINISTIC"] = "1"  # mamba-ssm then skips its autotuner, which needs a GPU's driver
