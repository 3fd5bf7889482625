"""All tests share the tiny checkpoints of `tiny_of`; the settings here must be made before a test module is imported.

- Without a GPU, the tests run Triton's kernels in Triton's interpreter, which computes on CPU tensors. Triton reads
  TRITON_INTERPRET while it is imported, and a test's transformers may import Triton.
- `model.cpu` sets the folder in which numba keeps compiled kernels. numba reads the setting while a module with kernels
  is imported. Without the setting, numba would compile the planner once more for another folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

import model.cpu  # noqa: F401

if TYPE_CHECKING:
    from tests.model.checkpoints import Tiny

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["MAMBA_DETERMINISTIC"] = "1"  # mamba-ssm then skips its autotuner, which needs a GPU's driver


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Return a function that takes a variant's name and returns its tiny checkpoint, which is written only once."""
    from tests.model.variants import write_variant  # imports transformers, which most tests do not need

    return cache(lambda name: write_variant(tmp_path_factory.mktemp(name), name))
