"""Imported first where a process of the application starts: what takes seconds of a core is imported by a thread that
gives way to the processes that answer meanwhile."""

from __future__ import annotations

from importlib import import_module

from services.low_priority import threads

for slow in ("torch", "numba"):
    threads().submit(import_module, slow).result()
