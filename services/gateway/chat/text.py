"""Text to tokens and back: tokenizer and chat template, incremental detokenizer, stop strings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer

THINK_START, THINK_END = "<think>", "</think>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class PastCall:
    """A tool call of an earlier turn; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str | None
    name: str = ""
    reasoning: str = ""
    tool_calls: tuple[PastCall, ...] = ()
    tool_call_id: str = ""


def check_message(message: ChatMessage, place: str) -> ChatMessage:
    """Raises ValueError, with `place` in the sentence, for a field that does not fit the role."""
    is_assistant, is_tool = message.role == "assistant", message.role == "tool"
    if message.tool_calls and not is_assistant:
        raise ValueError(f"{place}.tool_calls may only be given where the role is 'assistant'.")
    if message.reasoning and not is_assistant:
        raise ValueError(f"{place}.reasoning_content may only be given where the role is 'assistant'.")
    if bool(message.tool_call_id) != is_tool:
        raise ValueError(f"{place}.tool_call_id must be given where the role is 'tool', and only there.")
    if message.content is None and not (message.tool_calls or message.reasoning):
        raise ValueError(f"{place}.content is missing, but required.")
    # "developer" is OpenAI's newer name of the system role; templates know the old one.
    return replace(message, role="system") if message.role == "developer" else message


@dataclass(frozen=True)
class Chat:
    """What the template renders; `tools` in OpenAI's shape, `template_kwargs` as the model's template defines them."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True


@dataclass(frozen=True)
class Marker:
    """A string that structures answers, and the single special token it is, where the tokenizer has it as one."""

    text: str
    special_id: int | None


class Tokenizer:
    """The tokenizer and chat template of a model directory, read from disk only.

    Only byte-level tokenizers are supported (Nemotron, DeepSeek and Qwen have them): every token is a fixed string of
    bytes, so detokenizing is joining bytes. A directory without one is a ValueError.
    """

    def __init__(self, path: str | Path) -> None:
        self._hf: Any = _load(Path(path))
        self.token_bytes = _token_bytes(self._hf, Path(path))
        added = self._hf.backend_tokenizer.get_added_tokens_decoder()
        self._special = {token_id: str(token.content) for token_id, token in added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def spelled(self, token_id: int) -> bytes:
        """The bytes of a token, those of special tokens being their names; b"" beyond the vocabulary."""
        if token_id in self._special:
            return self._special[token_id].encode()
        return self.token_bytes[token_id] if token_id < self.vocab_size else b""

    def marker(self, text: str) -> Marker:
        return Marker(text, next((token_id for token_id, name in self._special.items() if name == text), None))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special tokens by their names; bytes that are no character become U+FFFD."""
        return b"".join(map(self.spelled, token_ids)).decode("utf-8", "replace")

    @property
    def special_markers(self) -> list[Marker]:
        """Every special token, for a detokenizer that is to show their names."""
        return [Marker(name, token_id) for token_id, name in self._special.items()]

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself, as of `decode`."""
        return [self.decode([token_id]) for token_id in token_ids]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with what the tokenizer itself puts before it (usually nothing)."""
        # The fast tokenizer underneath keeps no state between calls, so threads may share it.
        return list(self._hf.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def render(self, chat: Chat) -> str:
        """The conversation as the template writes it, up to where the assistant speaks next.

        Raises ValueError where there are no messages or no chat template, or the template refuses the messages.
        """
        if not chat.messages:
            raise ValueError("messages must hold at least one message.")
        if not self._hf.chat_template:
            raise ValueError("messages cannot be used because the model has no chat template; use /v1/completions.")
        try:
            text = self._hf.apply_chat_template(
                [_for_template(message) for message in chat.messages],
                tools=[dict(tool) for tool in chat.tools] or None,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt,
                **chat.template_kwargs,
            )
        except (jinja2.TemplateError, TypeError) as error:  # a TypeError: a template without care for a missing content
            raise ValueError(f"messages do not fit the model's chat template: {str(error).rstrip('.')}.") from error
        return str(text)


def _past_call(call: PastCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _for_template(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates of Hugging Face expect it: arguments are an object, absent fields are absent."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.tool_calls:
        fields["tool_calls"] = [_past_call(call) for call in message.tool_calls]
    optional = {"name": message.name, "reasoning_content": message.reasoning, "tool_call_id": message.tool_call_id}
    return fields | {name: value for name, value in optional.items() if value}


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


class StopMatcher:
    """Lets text through up to the first stop string that completes; never a part of one.

    One Knuth-Morris-Pratt automaton per stop string: time is linear in the text, and where the text was cut into pieces
    makes no difference. Text is held back only while it is the beginning of a stop string.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.stop = ""  # the stop string that completed

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string completed; then `flush` gives what follows it."""
        if not self._automata:
            return text, False
        self._held += text
        first_new = len(self._held) - len(text)
        for position, char in enumerate(text, first_new + 1):
            if stop_len := self._advance(char):
                shown, self.stop = self._held[: position - stop_len], self._held[position - stop_len : position]
                self._held = self._held[position:]
                return shown, True
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
