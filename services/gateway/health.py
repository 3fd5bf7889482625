"""A `Health` says whether the server can answer requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Health:
    """A `Health` says whether the server answers requests, and whether it does so with fewer experts than it should."""

    is_ready: bool
    is_degraded: bool = False  # requests are answered, but experts have fewer live homes than they should
    detail: str = ""  # one sentence for operators
