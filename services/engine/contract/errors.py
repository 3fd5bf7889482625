"""The engine refuses or ends a request with an error of this module; each error has a REST and a gRPC status."""

from __future__ import annotations


class EngineOverloaded(Exception):
    """An `EngineOverloaded` says that too many requests are waiting; clients may retry after `retry_after` seconds.

    REST answers with 429, gRPC with RESOURCE_EXHAUSTED.
    """

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(Exception):
    """An `EngineFailed` says that the engine could not finish a request, and that the client is not at fault.

    REST answers with 500, gRPC with INTERNAL.
    """


class DeadlinePassed(TimeoutError):
    """A `DeadlinePassed` says that the deadline of a request passed before the request's last token was generated.

    REST answers with 504, gRPC with DEADLINE_EXCEEDED.
    """
