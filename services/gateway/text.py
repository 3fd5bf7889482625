"""Text to tokens and back: chat template, incremental detokenizer, stop strings."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

INLINE_CHARS = 16_384  # about 5 ms of tokenizing; longer texts leave the event loop alone


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    messages: tuple[ChatMessage, ...]


class Tokenizer:
    """The tokenizer and chat template of a model directory, read from disk only.

    Only byte-level tokenizers are supported (Nemotron, DeepSeek and Qwen have them): every token is a fixed string of
    bytes, so detokenizing is joining bytes. A directory without one is a ValueError.
    """

    def __init__(self, path: str | Path) -> None:
        self._hf: Any = _load(Path(path))
        self.token_bytes = _token_bytes(self._hf, Path(path))

    async def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with what the tokenizer itself puts before it (usually nothing)."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, chat: Chat) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next.

        Raises ValueError where there are no messages or no chat template, or the template refuses the messages.
        """
        if not chat.messages:
            raise ValueError("messages must hold at least one message.")
        if not self._hf.chat_template:
            raise ValueError("messages cannot be used because the model has no chat template; use /v1/completions.")
        return await self._encode(self._render(chat), add_special_tokens=False)

    def _render(self, chat: Chat) -> str:
        conversation = [asdict(message) for message in chat.messages]
        try:
            return str(self._hf.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise ValueError(f"messages do not fit the model's chat template: {str(error).rstrip('.')}.") from error

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self._token_ids(text, add_special_tokens)
        return await asyncio.to_thread(self._token_ids, text, add_special_tokens)

    def _token_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # The fast tokenizer underneath keeps no state between calls, so threads may share it.
        return list(self._hf.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


class Detokenizer:
    """Turns tokens into text as they come, in time linear in their bytes.

    Bytes that can still become a character are held back; bytes that cannot become U+FFFD, as in a full decode. What is
    still held when the request ends is half a character and is never shown.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        # A model's vocabulary may be padded beyond the tokenizer's: such ids have no text.
        has_text = token_id < len(self._token_bytes)
        return self._utf8.decode(self._token_bytes[token_id]) if has_text else ""


class StopMatcher:
    """Lets text through up to the first stop string that completes; never a part of one.

    One Knuth-Morris-Pratt automaton per stop string: time is linear in the text, and where the text was cut into pieces
    makes no difference. Text is held back only while it is the beginning of a stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string completed."""
        if not self._automata:
            return text, False
        self._held += text
        first_new = len(self._held) - len(text)
        for position, char in enumerate(text, first_new + 1):
            if stop_len := self._advance(char):
                return self._held[: position - stop_len], True
        num_shown = len(self._held) - max(automaton.matched for automaton in self._automata)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown, False

    def _advance(self, char: str) -> int:
        """Length of the longest stop string that ends with this character, or 0."""
        ended = [automaton.advance(char) for automaton in self._automata]
        return max((len(a.pattern) for a, end in zip(self._automata, ended, strict=True) if end), default=0)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _Automaton:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.matched = pattern, 0
        self._borders = [0]  # of each prefix: the length of its longest proper prefix that is also its suffix
        for char in pattern[1:]:
            self._borders.append(self._next(self._borders[-1], char))

    def _next(self, matched: int, char: str) -> int:
        while matched and self.pattern[matched] != char:
            matched = self._borders[matched - 1]
        return matched + (self.pattern[matched] == char)

    def advance(self, char: str) -> bool:
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.pattern)


def _load(path: Path) -> Any:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"The model directory {path} must hold a tokenizer.json.")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"The tokenizer in {path} cannot be loaded: {error}") from error


def _token_bytes(hf: Any, path: Path) -> list[bytes]:
    """The bytes of every token id; special tokens have none. Source: the byte alphabet of GPT-2's encoder.py."""
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
    """Byte-level tokenizers write printable Latin-1 bytes as themselves and the other 68 as U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
