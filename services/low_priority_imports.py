"""The import of this module makes a low-priority thread import torch and numba, which takes seconds of CPU time.

Every process of the application imports this module first. Thus a process that starts does not slow down the processes
that answer requests.
"""

from __future__ import annotations

from importlib import import_module

from services.low_priority import low_priority_threads

for slow in ("torch", "numba"):
    low_priority_threads().submit(import_module, slow).result()
