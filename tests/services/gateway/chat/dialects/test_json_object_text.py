from __future__ import annotations

import pytest

from services.gateway.chat.dialects.json_object_text import PAIR_LEN, JsonObjectText

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


@pytest.mark.parametrize("value", ["1" * 3000, "-0." + "7" * 3000, "1e" + "9" * 3000, '"' + "\\n" * 1500, "[" * 3000])
def test_no_text_is_read_again_but_the_beginning_of_an_escape(value: str) -> None:
    """Check that the time is linear: text that is held back is read again with every piece."""
    reader, shown = JsonObjectText(), ""
    for char in f'{{"a": {value}':
        shown += reader.push(char)[0]
        assert len(reader._held) < PAIR_LEN
    shown += reader.push(",")[0]
    assert shown.startswith(('{"a": 1.797', f'{{"a": {value},'))
