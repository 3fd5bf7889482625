from __future__ import annotations

import json
import random
from typing import Any

import pytest

from services.gateway.schema import json_size
from services.gateway.schema.json_size import JsonSize, check_size

TEXTS = ["a", 'q"[{\\', "]}", '\\"', "", "é"]


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice([1, None, True, *TEXTS])
    if kind < 0.6:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {f"{rng.choice(TEXTS)}{n}": random_value(rng, depth - 1) for n in range(rng.randrange(4))}


def depth_of(value: Any) -> int:
    """Return the depth of nesting of `value`; the recursion is the oracle for `JsonSize`."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def num_values(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + num_values(child) for child in value.values())
    if isinstance(value, list):
        return 1 + sum(map(num_values, value))
    return int(isinstance(value, str))


def num_items(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return max(1, len(value)) + sum(map(num_items, value.values() if isinstance(value, dict) else value))


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_size(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_size, "BLOCK", block)
    rng = random.Random(1)
    for _ in range(200):
        value = random_value(rng, 6)
        for is_ascii in (True, False):
            size = JsonSize.of(json.dumps(value, ensure_ascii=is_ascii).encode())
            assert (size.depth, size.num_values) == (depth_of(value), num_values(value)), value
            assert size.num_items == num_items(value), value


def test_limits() -> None:
    check_size(b"[[[1]]]", 3, 3, 3)
    check_size(b"[1, 2, 3, 4, 5, 6, 7, 8]", 1, 1, 8)
    with pytest.raises(ValueError, match=r"^may be nested at most 2 levels deep, not 3$"):
        check_size(b"[[[1]]]", 2, 3, 9)
    with pytest.raises(ValueError, match=r"^may hold at most 3 objects, lists and strings, not 4$"):
        check_size(b'[{"a": "b"}]', 8, 3, 9)
    with pytest.raises(ValueError, match=r"^may hold at most 7 items in all lists and objects, not 8$"):
        check_size(b"[1, 2, 3, [4, 5, 6], 7]", 8, 9, 7)
    check_size(b'["' + b"[" * 100 + b"," * 100 + b'"]', 1, 2, 1)  # marks inside of a string do not count
