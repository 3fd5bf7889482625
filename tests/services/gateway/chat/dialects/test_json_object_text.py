from __future__ import annotations

import pytest

from services.gateway.chat.dialects.json_object_text import JsonObjectText

LARGEST = "1.7976931348623157e+308"


def read(pieces: list[str]) -> tuple[str, str, bool]:
    """Return the text that was shown, the text after the object, and True if the object ended."""
    reader, shown, rest = JsonObjectText(), "", ""
    for n, piece in enumerate(pieces):
        some, rest = reader.push(piece)
        shown += some
        if reader.is_whole:
            return shown, rest + "".join(pieces[n + 1 :]), True
        assert rest == ""
    return shown, rest, False


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"a": 1}', '{"a": 1}'),
        ("{}", "{}"),
        ('{ "a" : [ {"b": "}"}, "]\\"}" ] }', '{ "a" : [ {"b": "}"}, "]\\"}" ] }'),
        ('{"a": "\\\\", "b": "\\u00e9\\n"}', '{"a": "\\\\", "b": "\\u00e9\\n"}'),
        ('{"a": "\\ud83d\\ude00"}', '{"a": "\\ud83d\\ude00"}'),
        ('{"a": "\\ud83d", "\\udc00": "\\ud83d\\u0041"}', '{"a": "\\ufffd", "\\ufffd": "\\ufffd\\u0041"}'),
        ('{"a": "\\ud83d\\n", "b": "\\\\ud83d"}', '{"a": "\\ufffd\\n", "b": "\\\\ud83d"}'),
        ('{"a": [1e999, -1E999, 1e30, 12]}', f'{{"a": [{LARGEST}, -{LARGEST}, 1e30, 12]}}'),
        ('{"a": 1-2e}', '{"a": 1-2e}'),  # no JSON
    ],
)
def test_an_object_ends_with_its_last_bracket(text: str, shown: str) -> None:
    for after in ("", '\n```{"b": 2}'):
        whole = text + after
        for size in (1, 2, 5, len(whole)):
            pieces = [whole[n : n + size] for n in range(0, len(whole), size)]
            assert read(pieces) == (shown, after, True), size


@pytest.mark.parametrize(
    ("text", "shown"),
    [('{"a": "Par', '{"a": "Par'), ('{"a": 1', '{"a": '), ('{"a": "\\ud8', '{"a": "'), ('{"a": {}', None)],
)
def test_an_object_that_is_cut_off(text: str, shown: str | None) -> None:
    assert read([text]) == read(list(text)) == (shown or text, "", False)
