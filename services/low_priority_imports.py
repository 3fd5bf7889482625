"""Importing this module imports, on a low-priority thread, the packages whose import takes seconds of a core.

A process of the application imports it first, so that its start does not slow down the processes that answer requests
meanwhile.
"""

from __future__ import annotations

from importlib import import_module

from services.low_priority import low_priority_threads

for slow in ("torch", "numba"):
    low_priority_threads().submit(import_module, slow).result()
