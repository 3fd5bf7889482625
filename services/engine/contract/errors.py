"""Defines the errors with which the engine refuses or ends a request, each with its REST and gRPC status."""

from __future__ import annotations


class EngineOverloaded(Exception):
    """Too many requests are waiting; a client should retry after `retry_after` seconds.

    REST answers with 429, gRPC with RESOURCE_EXHAUSTED.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(Exception):
    """The engine could not finish the request, and the client is not at fault.

    REST answers with 500, gRPC with INTERNAL.
    """


class DeadlinePassed(TimeoutError):
    """The request's own deadline passed before its last token.

    REST answers with 504, gRPC with DEADLINE_EXCEEDED.
    """
