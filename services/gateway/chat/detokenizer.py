"""Turns the tokens of an answer into text as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from services.gateway.chat.markers import Marker


class Detokenizer:
    """Turns tokens into text as they come, in time linear in their bytes.

    Bytes that can still become a character are held back; bytes that cannot become U+FFFD, as in a full decode. What is
    still held when the request ends is half a character and is never shown.
    """

    def __init__(self, token_bytes: Sequence[bytes], markers: Iterable[Marker] = ()) -> None:
        self._token_bytes = token_bytes
        self._markers = {marker.special_id: marker.text.encode() for marker in markers}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Special tokens have no text, but for `markers`."""
        if (marker := self._markers.get(token_id)) is not None:
            return self._utf8.decode(marker)
        # A model's vocabulary may be padded beyond the tokenizer's: such ids have no text.
        has_text = token_id < len(self._token_bytes)
        return self._utf8.decode(self._token_bytes[token_id]) if has_text else ""
