"""A `Health` says whether the server can answer requests, and what does not work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """A `Health` says whether the server answers requests, and whether some backbones or shards do not work."""

    is_ready: bool
    is_degraded: bool = False  # requests are answered, but some backbones or shards do not work
    detail: str = ""  # what does not work, in sentences for operators
