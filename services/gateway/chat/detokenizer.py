"""A `Detokenizer` turns the tokens of an answer into text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from services.gateway.chat.markers import Marker


class Detokenizer:
    """A `Detokenizer` turns tokens into text one by one, in time linear in the number of bytes.

    Bytes that may still become a character are held back. Bytes that cannot become a character are shown as U+FFFD, as
    if all tokens were decoded at once. An incomplete character at the end of a request is never shown.
    """

    def __init__(self, token_bytes: Sequence[bytes], markers: Iterable[Marker] = ()) -> None:
        self._token_bytes = token_bytes
        self._markers = {marker.token_id: marker.text.encode() for marker in markers}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that the token `token_id` adds; of the special tokens, only the `markers` have text."""
        if (marker := self._markers.get(token_id)) is not None:
            return self._utf8.decode(marker)
        # A model's vocabulary may be larger than the tokenizer's vocabulary, because the model's vocabulary may be
        # padded. The ids of the padding have no text.
        has_text = token_id < len(self._token_bytes)
        return self._utf8.decode(self._token_bytes[token_id]) if has_text else ""
