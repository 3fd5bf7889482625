from __future__ import annotations

import json

import pytest

from services.gateway.schema.json_text import ENCODE, dump_parts, dumps, loads, mend_body, mend_text


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


@pytest.mark.parametrize("num_items", [0, 1, 31, 128, 129, 1000])
def test_parts_make_the_same_text(num_items: int) -> None:
    scores = [None, *({str(n): {"logprob": -n / 3, "decoded_token": f'é"{n}'}} for n in range(num_items))]
    ids = tuple(range(num_items))
    value = {"id": "x", "choices": [{"text": "ü\n", "logprobs": {"content": scores, "ids": ids}, "prompt": scores}] * 2}
    assert dump_parts(value) == ENCODE(value)
    assert dump_parts([[], {}, "", None, 1.5]) == ENCODE([[], {}, "", None, 1.5])


def test_no_call_holds_the_lock_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a response with 49,000 logprobs is written in parts of at most a fiftieth of its length."""
    lens: list[int] = []

    def counting(value: object) -> str:
        lens.append(len(text := ENCODE(value)))
        return text

    monkeypatch.setattr("services.gateway.schema.json_text.ENCODE", counting)
    top = {str(n): {"logprob": -1.0 / (n + 1), "rank": n, "decoded_token": "token"} for n in range(21)}
    whole = dump_parts({"choices": [{"index": 0, "prompt_logprobs": [None] + [top] * 2340}]})
    assert len(whole) > 2_000_000
    assert max(lens) < len(whole) / 50
    lens.clear()
    chat = {"content": [{"token": "a", "top_logprobs": [{"token": "b", "logprob": -1.0}] * 20}] * 16}
    whole = dump_parts({"choices": [{"index": n, "logprobs": chat} for n in range(128)]})
    assert max(lens) < len(whole) / 50
