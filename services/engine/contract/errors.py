"""The ways in which the engine refuses or ends a request, each with its REST and gRPC status."""

from __future__ import annotations


class EngineOverloaded(Exception):
    """Too many requests are waiting; ask again after `retry_after` seconds (REST 429, gRPC RESOURCE_EXHAUSTED)."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(Exception):
    """The engine could not finish this request through no fault of the client (REST 500, gRPC INTERNAL)."""


class DeadlinePassed(TimeoutError):
    """The request's own deadline passed before its last token (REST 504, gRPC DEADLINE_EXCEEDED)."""
