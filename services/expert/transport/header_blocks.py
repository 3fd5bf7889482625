"""A `HeaderReader` reads the header blocks of an HTTP/2 connection, and `encode_headers` writes them.

The library hpack codes the headers. A stream has only two or three header blocks, so their speed does not matter.
Sources: RFC 9113, sections 4.3 and 6.2; RFC 7541.
"""

from __future__ import annotations

from typing import NamedTuple

from hpack import Decoder, Encoder, HPACKError
from hpack.struct import NeverIndexedHeaderTuple

from services.expert.transport.http2_errors import COMPRESSION_ERROR, ENHANCE_YOUR_CALM, PROTOCOL_ERROR, ProtocolBroken

HEADERS, CONTINUATION = 1, 9
END_STREAM, END_HEADERS, PADDED, PRIORITY = 1, 4, 8, 32
PRIORITY_BYTES = 5
MAX_BLOCK = 1 << 15  # bytes of a header block, encoded or decoded; gRPC clients limit metadata to 8 or 16 KB


class Headers(NamedTuple):
    """`Headers` are the headers of one block, by lower-case name; of two headers with one name, the last one counts."""

    stream_id: int
    fields: dict[str, str]
    ends_stream: bool


def encode_headers(*fields: tuple[str, str]) -> bytes:
    """Return a header block that any decoder can read, because it neither reads nor changes the dynamic table."""
    return Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in fields])


class HeaderReader:
    """A `HeaderReader` joins the frames of each header block, and decodes the blocks in their order."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=MAX_BLOCK)
        self._block = bytearray()
        self.open_stream_id = 0  # the stream whose header block is not complete yet, or 0
        self._ends_stream = False

    def check_order(self, kind: int, stream_id: int) -> None:
        """Raise ProtocolBroken if a frame of this type may not come now: a header block must not be interrupted."""
        if (kind == CONTINUATION) != bool(self.open_stream_id) or (
            self.open_stream_id and stream_id != self.open_stream_id
        ):
            expected = f"a CONTINUATION of stream {self.open_stream_id}" if self.open_stream_id else "no CONTINUATION"
            raise ProtocolBroken(PROTOCOL_ERROR, f"a frame of type {kind} came where {expected} was expected")

    def read(self, kind: int, flags: int, stream_id: int, payload: bytes) -> Headers | None:
        """Return the headers that a HEADERS or CONTINUATION frame completes, or None; raise ProtocolBroken."""
        if kind == HEADERS:
            self.open_stream_id, self._ends_stream = stream_id, bool(flags & END_STREAM)
            payload = _without_padding(flags, payload)
        self._block += payload
        if len(self._block) > MAX_BLOCK:
            raise ProtocolBroken(ENHANCE_YOUR_CALM, f"a header block has more than {MAX_BLOCK} bytes")
        if not flags & END_HEADERS:
            return None
        try:
            fields = {str(name): str(value) for name, value in self._decoder.decode(bytes(self._block))}
        except (HPACKError, UnicodeDecodeError) as error:
            detail = f"a header block cannot be decoded ({type(error).__name__})"
            raise ProtocolBroken(COMPRESSION_ERROR, detail) from None
        self._block.clear()
        self.open_stream_id = 0
        return Headers(stream_id, fields, self._ends_stream)


def _without_padding(flags: int, payload: bytes) -> bytes:
    """Return the part of a HEADERS frame that belongs to the header block."""
    start = PRIORITY_BYTES if flags & PRIORITY else 0
    num_padding = 0
    if flags & PADDED:
        start += 1
        num_padding = payload[0] if payload else 0
    if start + num_padding > len(payload):
        raise ProtocolBroken(PROTOCOL_ERROR, f"a HEADERS frame of {len(payload)} bytes is shorter than its padding")
    return payload[start : len(payload) - num_padding]
