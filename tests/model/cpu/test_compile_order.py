"""The tests check that a kernel's bits do not depend on which kernel was compiled first in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# Compile a caller that may regroup sums and one that may not, in the given order; print the results of both.
PROGRAM = """
import sys
import numpy as np
from numba import njit
from model.cpu.functions import exp, silu

def both(x):
    for i in range(len(x)):
        x[i] = silu(x[i]) + exp(x[i])

callers = {"fast": njit(fastmath={"contract", "reassoc", "nsz"})(both), "exact": njit(both)}
numbers = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
for name in sys.argv[1:]:
    callers[name](numbers[:1].copy())
exact = numbers.copy()
callers["exact"](exact)
print(exact.tobytes().hex())
"""


def results(tmp_path: Path, *order: str) -> str:
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "-".join(order)), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *order]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_order_of_compilation_changes_no_bit(tmp_path: Path) -> None:
    assert results(tmp_path, "fast", "exact") == results(tmp_path, "exact", "fast") != ""
