from __future__ import annotations

import json

import pytest

from services.gateway.schema.json_text import dumps, loads, mend_body, mend_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'"\ud83d"', "\ufffd"),
        (r'"a\uD83Db"', "a\ufffdb"),
        (r'"\ude00"', "\ufffd"),
        (r'"\ud83d\ude00"', "😀"),
        (r'"\ud83d\ud83d\ude00"', "\ufffd😀"),
        (r'"\\ud83d"', r"\ud83d"),  # an escaped backslash, and no escape of a surrogate
        (r'"\\\ud83d"', "\\\ufffd"),
        ('"\ud83d"', "\ufffd"),
        (r'{"\udfff": 1}', {"\ufffd": 1}),
        ('"é"', "é"),
    ],
)
def test_half_of_a_surrogate_pair_becomes_a_replacement_character(text: str, value: object) -> None:
    assert loads(text) == value
    assert json.loads(mend_body(mend_text(text).encode())) == value


def test_what_is_written_is_unicode() -> None:
    assert dumps({"a": "\ud83d é"}) == '{"a": "\ufffd é"}'
    assert mend_text("\ud83d\ude00\ud83d") == "😀\ufffd"


def test_json_nested_too_deep_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested at most 128 levels deep"):
        loads("[" * 100_000)
