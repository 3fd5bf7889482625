"""An `ApiError` is an error that the gateway reports to the client, with an HTTP status and a gRPC code."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import grpc

from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded

logger = logging.getLogger(__name__)


class ApiRefusal(Enum):
    """An `ApiRefusal` is a reason to refuse a request.

    Each reason holds its label in metrics, its HTTP status, its `type` in the JSON body and its gRPC code.
    """

    INVALID = ("invalid", 400, "invalid_request_error", grpc.StatusCode.INVALID_ARGUMENT)
    UNAUTHENTICATED = ("unauthenticated", 401, "authentication_error", grpc.StatusCode.UNAUTHENTICATED)
    FORBIDDEN = ("forbidden", 403, "permission_error", grpc.StatusCode.PERMISSION_DENIED)
    NOT_FOUND = ("not_found", 404, "invalid_request_error", grpc.StatusCode.NOT_FOUND)
    METHOD = ("method", 405, "invalid_request_error", grpc.StatusCode.UNIMPLEMENTED)
    TIMEOUT = ("timeout", 408, "invalid_request_error", grpc.StatusCode.DEADLINE_EXCEEDED)
    TOO_LARGE = ("too_large", 413, "invalid_request_error", grpc.StatusCode.RESOURCE_EXHAUSTED)
    MEDIA_TYPE = ("media_type", 415, "invalid_request_error", grpc.StatusCode.INVALID_ARGUMENT)
    OVERLOADED = ("overloaded", 429, "rate_limit_error", grpc.StatusCode.RESOURCE_EXHAUSTED)
    HEADERS_TOO_LARGE = ("headers_too_large", 431, "invalid_request_error", grpc.StatusCode.RESOURCE_EXHAUSTED)
    FAILED = ("failed", 500, "server_error", grpc.StatusCode.INTERNAL)
    UNAVAILABLE = ("unavailable", 503, "server_error", grpc.StatusCode.UNAVAILABLE)
    DEADLINE = ("deadline", 504, "server_error", grpc.StatusCode.DEADLINE_EXCEEDED)

    def __init__(self, label: str, status: int, type_: str, grpc_code: grpc.StatusCode) -> None:
        self.label, self.status, self.type, self.grpc_code = label, status, type_, grpc_code


class ApiError(Exception):
    """An `ApiError` refuses a request with one full sentence for the client.

    - `message`: the sentence.
    - `param`: name of the request's parameter that causes the refusal; None if no single parameter causes the refusal.
    - `code`: OpenAI's code for the mistake; None if OpenAI has no code for the mistake.
    - `retry_after`: seconds after which the client may send the request again; None if a retry would not help.
    """

    def __init__(
        self,
        refusal: ApiRefusal,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.refusal, self.message = refusal, message
        self.param, self.code, self.retry_after = param, code, retry_after

    def to_json(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": self.refusal.type, "param": self.param, "code": self.code},
        }

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """Return the error for an API that has other names for some parameters.

        `names` holds a replacement for each regular expression that matches a parameter's name.
        """
        message, param = self.message, self.param
        for name, replacement in names.items():
            pattern = rf"(?<![\w.'\"]){name}(?![\w'\"])"
            message = re.sub(pattern, replacement, message)
            param = param and re.sub(pattern, replacement, param)
        return ApiError(self.refusal, message, param, self.code, self.retry_after)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class GrpcError(Exception):
    """A `GrpcError` ends an RPC with a gRPC status code and one sentence for the client."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    def __reduce__(self) -> tuple[type[GrpcError], tuple[grpc.StatusCode, str]]:
        # Ray pickles the error on its way from the replica to Serve's proxy.
        return GrpcError, (self.code, self.message)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(ApiRefusal.INVALID, message, param, code)


@contextmanager
def client_errors() -> Iterator[None]:
    """Turn every exception that the `with` block raises into the ApiError to report to the client."""
    try:
        yield
    except ApiError:
        raise
    except Exception as error:
        raise _from_exception(error) from error


def _from_exception(error: Exception) -> ApiError:
    match error:
        case EngineOverloaded():
            message = str(error) or "Too many requests are waiting; try again later."
            return ApiError(ApiRefusal.OVERLOADED, message, code="rate_limit_exceeded", retry_after=error.retry_after)
        case DeadlinePassed():
            return ApiError(ApiRefusal.DEADLINE, str(error))
        case EngineFailed():
            return ApiError(ApiRefusal.FAILED, str(error))
        case ValueError():
            return _bad_value(error)
    return unexpected(error)


def _bad_value(error: ValueError) -> ApiError:
    """Return an ApiError for a bad value, with the parameter's name if the message of `error` begins with a name.

    The messages of SamplingParams, the engine and the request parsers begin with the name of the bad parameter.
    """
    name = re.match(r"[a-z][a-z_.\[\]0-9]*\b\]?(?= )", str(error))
    return invalid(str(error), name and name.group())


def unexpected(error: Exception) -> ApiError:
    """Log an exception that is the server's fault, and return an ApiError that hides the exception's details."""
    logger.error("A request failed unexpectedly.", exc_info=error)
    return ApiError(ApiRefusal.FAILED, "The server failed; its log says more.")
