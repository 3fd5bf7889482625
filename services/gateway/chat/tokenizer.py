"""A `Tokenizer` holds the tokenizer and the chat template of a model directory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from services.gateway.chat.chat_template import ChatTemplate
from services.gateway.chat.conversation import Conversation
from services.gateway.chat.dialects.dialect import Dialect
from services.gateway.chat.markers import Marker
from services.gateway.schema.json_text import mend_text


class Tokenizer:
    """A `Tokenizer` turns text and conversations into token ids and token ids into text.

    A tokenizer is read from a model directory on disk, without network access. Only byte-level tokenizers are supported
    (Nemotron, DeepSeek and Qwen have byte-level tokenizers). Every token of a byte-level tokenizer is a fixed string of
    bytes, so detokenizing means to join bytes. Raises ValueError if the directory has no byte-level tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        self._hf: Any = _load(Path(path))
        self.token_bytes = _token_bytes(self._hf, Path(path))
        added = self._hf.backend_tokenizer.get_added_tokens_decoder()
        self._special = {token_id: str(token.content) for token_id, token in added.items() if token.special}
        self._added = {str(token.content): token_id for token_id, token in added.items()}
        self.template = ChatTemplate(self._hf, self.marker)

    @property
    def dialect(self) -> Dialect:
        """Return the model's chat format, with the markers of this tokenizer."""
        return self.template.dialect

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def spelling(self, token_id: int) -> bytes:
        """Return the bytes of a token.

        The bytes of a special token are its name. An id beyond the vocabulary has the bytes b"".
        """
        if token_id in self._special:
            return self._special[token_id].encode()
        return self.token_bytes[token_id] if token_id < self.vocab_size else b""

    def blank_ids(self) -> tuple[int, ...]:
        """Return the ids of all tokens that are white space, in time linear in the size of the vocabulary."""
        texts = (data.decode("utf-8", "replace") for data in self.token_bytes)
        return tuple(token_id for token_id, text in enumerate(texts) if text.isspace())

    def marker(self, text: str) -> Marker:
        """Return the marker for the string `text`, with the token id if the string is an added token.

        Some models have added tokens for calls that are not special. In grammars, the library finds these tokens by
        their ids only, too, because their names begin with `<` and end with `>`.
        """
        return Marker(text, self._added.get(text))

    def marker_ids(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Return, for each token of the marker `text`, the ids that the token may have; see `ThinkingBudget.end_ids`.

        The search takes time linear in the size of the vocabulary: 20 ms for 131,072 tokens.
        """
        if (token_id := self.marker(text).token_id) is not None:
            return ((token_id,),)
        ids = self.encode(text, add_special_tokens=False)
        found = [[token_id] for token_id in ids]
        first, last = self.token_bytes[ids[0]], self.token_bytes[ids[-1]]
        for token_id, data in enumerate(self.token_bytes):
            if len(ids) == 1:
                found[0] += [token_id] if first in data and token_id != ids[0] else []
                continue
            found[0] += [token_id] if data.endswith(first) and token_id != ids[0] else []
            found[-1] += [token_id] if data.startswith(last) and token_id != ids[-1] else []
        return tuple(map(tuple, found))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`; special tokens become their names, and invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.spelling, token_ids)).decode("utf-8", "replace")

    @cached_property
    def special_markers(self) -> list[Marker]:
        """Return all special tokens as markers, for a detokenizer that shows their names."""
        return [Marker(name, token_id) for token_id, name in self._special.items()]

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return a list with the text of each token, decoded separately from the other tokens."""
        return [self.decode([token_id]) for token_id in token_ids]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        If `add_special_tokens` is True, the result begins with the special tokens that the tokenizer puts before every
        text. Most tokenizers put no special tokens there.
        """
        # The tokenizer's Rust implementation keeps no state between calls, so threads may share it. Unlike `encode`,
        # `encode_batch_fast` does not compute the tokens' positions in the text, so it takes less time, and holds
        # Python's global lock only for a short part of this time.
        batch = [mend_text(text)]
        [encoding] = self._hf.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def info(self) -> dict[str, Any]:
        """Return the tokenizer's settings and its chat template as JSON values, as vLLM's /tokenizer_info does.

        The paths of files are left out, because they tell a client only where the server keeps its files.
        """
        settings = {name: value for name, value in self._hf.init_kwargs.items() if not _is_of_files(name)}
        settings |= {"tokenizer_class": type(self._hf).__name__, "chat_template": self._hf.chat_template}
        shown: dict[str, Any] = _to_json(settings)
        return shown

    def render(self, chat: Conversation) -> str:
        """Return the text of the prompt that the chat template renders; see `ChatTemplate.render`."""
        return self.template.render(chat)


def _is_of_files(name: str) -> bool:
    return name.endswith(("_file", "_files")) or name.startswith("_") or name in ("name_or_path", "local_files_only")


def _to_json(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _to_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_to_json(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return str(getattr(value, "content", value))  # an AddedToken, or an enum that names itself


def _load(path: Path) -> Any:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"The model directory {path} must hold a tokenizer.json.")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The tokenizer in {path} cannot be loaded: {error}") from error


def _token_bytes(hf: Any, path: Path) -> list[bytes]:
    """Return a list with the bytes of every token, by token id; special tokens have no bytes.

    Source: the byte alphabet of GPT-2's encoder.py.
    """
    backend = hf.backend_tokenizer
    if "ByteLevel" not in repr(backend.decoder):
        raise ValueError(f"The tokenizer in {path} must be byte-level (its decoder ByteLevel), not {backend.decoder}.")
    table = [b""] * (max(backend.get_vocab().values()) + 1)
    for token, token_id in backend.get_vocab().items():
        table[token_id] = _bytes_of(token)
    for token_id, added in backend.get_added_tokens_decoder().items():
        table[token_id] = b"" if added.special else added.content.encode()
    return table


def _bytes_of(token: str) -> bytes:
    alphabet = _byte_alphabet()
    return bytes(alphabet[char] for char in token) if all(char in alphabet for char in token) else token.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return a mapping from each character of a byte-level vocabulary to the byte that the character stands for.

    A printable Latin-1 character stands for the byte that equals its code point. The characters from U+0100 on stand
    for the other 68 bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
