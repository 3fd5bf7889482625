"""The errors of HTTP/2 connections, and the codes with which the other side is told what it did wrong."""

from __future__ import annotations

NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED = 0, 1, 3, 5
FRAME_SIZE_ERROR, REFUSED_STREAM, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 6, 7, 9, 11


class StreamEnded(ConnectionError):
    """A `StreamEnded` error says that the other side ended the stream or broke the protocol, and how."""


class ProtocolBroken(StreamEnded):
    """A `ProtocolBroken` error says which rule of HTTP/2 or gRPC the other side broke.

    `code` is the error code (RFC 9113, section 7) for the GOAWAY frame that tells the other side.
    """

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
