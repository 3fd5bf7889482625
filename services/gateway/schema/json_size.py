"""A `JsonSize` says how deep a JSON text is nested and how many values it holds, before the text is parsed.

A parser makes an object of every value, while it holds Python's global lock, and code that walks a deep value exceeds
Python's recursion limit. Depth and number are therefore bounded first. The count costs about 10 ms for each
megabyte of text, and numpy releases the global lock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# limits of a JSON text that is a string inside of a request, such as the arguments of a past call
MAX_TEXT_DEPTH = 128
MAX_TEXT_VALUES = 65_536
MAX_TEXT_ITEMS = 131_072
BLOCK = 1 << 20  # bytes that are counted at a time, which bounds the memory
QUOTE, COMMA = ord('"'), ord(",")
STEPS = np.zeros(256, np.int8)  # change of the depth of nesting at each byte outside of strings
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1


@dataclass(frozen=True)
class JsonSize:
    depth: int
    num_values: int  # number of objects, lists and strings, with the names of fields
    num_items: int  # number of items of all lists and objects; an empty list or object counts as one item

    @classmethod
    def of(cls, data: bytes) -> JsonSize:
        """Return the size of the JSON text `data`. For invalid JSON, the result means nothing."""
        if b"\\" in data:
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
        text = np.frombuffer(data, np.uint8)
        level = deepest = num_open = num_quotes = num_commas = 0
        for start in range(0, len(text), BLOCK):
            block = text[start : start + BLOCK]
            is_quote = block == QUOTE
            outside = (np.cumsum(is_quote, dtype=np.uint8) + np.uint8(num_quotes % 2)) % 2 == 0
            steps = STEPS[block] * outside
            levels = np.cumsum(steps, dtype=np.int32)
            deepest = max(deepest, level + int(levels.max()))
            level += int(levels[-1])
            num_open += int(np.count_nonzero(steps > 0))
            num_commas += int(np.count_nonzero((block == COMMA) & outside))
            num_quotes += int(np.count_nonzero(is_quote))
        return cls(deepest, num_open + num_quotes // 2, num_commas + num_open)


def check_size(data: bytes, max_depth: int, max_values: int, max_items: int) -> None:
    """Raise ValueError if the JSON text `data` is nested deeper or holds more values than is allowed.

    `max_values` limits objects, lists and strings; `max_items` limits the items of all lists and objects, which may be
    numbers.
    """
    if data.count(b"[") + data.count(b"{") <= max_depth and len(data) <= 2 * min(max_values, max_items):
        return
    size = JsonSize.of(data)
    if size.depth > max_depth:
        raise ValueError(f"may be nested at most {max_depth} levels deep, not {size.depth}")
    if size.num_values > max_values:
        raise ValueError(f"may hold at most {max_values} objects, lists and strings, not {size.num_values}")
    if size.num_items > max_items:
        raise ValueError(f"may hold at most {max_items} items in all lists and objects, not {size.num_items}")


def check_text_size(text: str, param: str = "The JSON") -> None:
    """Raise ValueError if `text`, a JSON text inside of a request, is nested too deep or holds too many values.

    `param` is the name of the client's parameter that holds the text, for the error message.
    """
    try:
        check_size(text.encode(errors="replace"), MAX_TEXT_DEPTH, MAX_TEXT_VALUES, MAX_TEXT_ITEMS)
    except ValueError as error:
        raise ValueError(f"{param} {error}.") from error
