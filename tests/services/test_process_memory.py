"""The test counts the page faults of a process that allocates and frees large arrays."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource
import numpy as np
from services.process_memory import keep_freed_memory

if {keeps}:
    assert keep_freed_memory()
def use_arrays():
    first, second = np.ones(1 << 20, np.float32), np.ones(2 << 20, np.float32)
use_arrays()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    use_arrays()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these options")
def test_freed_arrays_are_used_again_without_page_faults() -> None:
    def num_faults(keeps: bool) -> int:
        return int(subprocess.check_output([sys.executable, "-c", CODE.format(keeps=keeps)], text=True))

    assert num_faults(keeps=True) < 500 < num_faults(keeps=False)
