"""`loads` and `dumps` read and write JSON text whose strings are Unicode text, without half surrogate pairs.

A JSON string may hold the escape of half a surrogate pair, such as `\\ud83d` without a second half. Half a pair stands
for no character, and neither UTF-8 nor a tokenizer can hold half a pair. As in most decoders, U+FFFD takes its place.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from services.gateway.schema.json_size import check_text_size

# an escaped pair of surrogates, half of a pair, or any other escape
ESCAPE = re.compile(
    r"\\(?:u(?P<pair>[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|u(?P<half>[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
BLOCK_LEN = 4096  # values that `dump_list` writes at once, which takes about 1 ms
PART_LEN = 32  # items of a list that `dump_parts` writes at once; tokens with 20 alternatives each take about 1 ms
RECURSED_LEN = 128  # items of a list that `dump_parts` writes one by one: as many as a response may have choices

ENCODE = json.JSONEncoder(ensure_ascii=False).encode


def mend_escapes(text: str) -> str:
    """Return the JSON text `text` with each escape of half a surrogate pair replaced by the escape of U+FFFD."""
    if "\\ud" not in text and "\\uD" not in text:
        return text
    return ESCAPE.sub(lambda found: r"\ufffd" if found["half"] else found[0], text)


def mend_body(data: bytes) -> bytes:
    """Return `data`, JSON in UTF-8, with each escape of half a surrogate pair replaced by the escape of U+FFFD."""
    if b"\\ud" not in data and b"\\uD" not in data:
        return data
    return mend_escapes(data.decode("latin-1")).encode("latin-1")  # escapes are ASCII; latin-1 keeps all other bytes


def mend_text(text: str) -> str:
    """Return `text` with U+FFFD in the place of each half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def finite_float(text: str) -> float:
    """Return the number `text`. Raises ValueError if the number is too large for a float."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text:.100} is too large")
    return value


def nearest_float(text: str) -> float:
    """Return the float that is nearest to the number `text`, which may be larger than every float."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def loads(
    text: str,
    parse_constant: Callable[[str], Any] | None = None,
    parse_float: Callable[[str], float] = finite_float,
) -> Any:
    """Return the value of the JSON text `text`.

    Raises ValueError if `text` is no JSON, is nested too deep, or holds a number that `parse_float` refuses.
    `parse_constant` is called with NaN, Infinity or -Infinity, which are not JSON, but which Python writes and reads.
    """
    check_text_size(text)
    return json.loads(mend_escapes(mend_text(text)), parse_constant=parse_constant, parse_float=parse_float)


def dumps(value: object) -> str:
    """Return `value` as JSON text in which characters outside ASCII are not escaped."""
    return mend_text(json.dumps(value, ensure_ascii=False))


def dump_list(values: Sequence[object] | None) -> str:
    """Return `values` as JSON text, written block by block, because a thread holds Python's lock during each block."""
    if values is None:
        return "null"
    blocks = (values[start : start + BLOCK_LEN] for start in range(0, len(values), BLOCK_LEN))
    return f"[{', '.join(dumps(block)[1:-1] for block in blocks)}]"


def dump_parts(value: object, depth: int = 5) -> str:
    """Return `value` as `ENCODE` writes it, but with many short calls of `ENCODE`.

    `ENCODE` holds Python's lock for the whole call, which stops all other threads: 100 ms for a response with 49,152
    logprobs. Only the `depth` outermost levels are written in parts, which is enough for the lists of logprobs in the
    choices of a response.
    """
    if depth and value and isinstance(value, dict):
        return f"{{{', '.join(f'{ENCODE(key)}: {dump_parts(item, depth - 1)}' for key, item in value.items())}}}"
    if depth and value and isinstance(value, list | tuple):
        if len(value) <= RECURSED_LEN:
            return f"[{', '.join(dump_parts(item, depth - 1) for item in value)}]"
        parts = (value[start : start + PART_LEN] for start in range(0, len(value), PART_LEN))
        return f"[{', '.join(ENCODE(part)[1:-1] for part in parts)}]"
    return ENCODE(value)
