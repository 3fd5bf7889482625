"""When this module is imported, a low-priority thread imports the packages whose import takes seconds of CPU time.

Every process of the application imports this module first, so that a starting process does not slow down the processes
that answer requests.
"""

from __future__ import annotations

from importlib import import_module

from services.low_priority import low_priority_threads

for slow in ("torch", "numba"):
    low_priority_threads().submit(import_module, slow).result()
