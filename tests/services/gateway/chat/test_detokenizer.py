from __future__ import annotations

import random

import pytest

from services.gateway.chat.detokenizer import Detokenizer
from services.gateway.chat.tokenizer import Tokenizer


def _incremental(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer.token_bytes)
    return "".join(detokenizer.push(token_id) for token_id in token_ids)


@pytest.mark.parametrize("text", ["hello world", "naïve 🦜🦜 日本語\n\t", "a <tool call> b", "é\u0301\u200d🏳️‍🌈"])
def test_incremental_text_equals_the_original(tokenizer: Tokenizer, text: str) -> None:
    assert _incremental(tokenizer, tokenizer.encode(text)) == text


def test_random_bytes_decode_as_in_one_piece(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    ids = tokenizer.encode("a")
    for _ in range(300):
        token_ids = [rng.randrange(262) for _ in range(30)] + ids  # "a" ends an incomplete character
        assert _incremental(tokenizer, token_ids) == tokenizer._hf.backend_tokenizer.decode(token_ids)


def test_half_a_character_is_held_back_and_never_shown(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🦜")
    assert len(token_ids) == 4
    detokenizer = Detokenizer(tokenizer.token_bytes)
    assert [detokenizer.push(token_id) for token_id in token_ids] == ["", "", "", "🦜"]
    assert _incremental(tokenizer, token_ids[:3]) == ""


def test_ids_beyond_the_tokenizer_and_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    assert _incremental(tokenizer, [100_000, tokenizer._hf.eos_token_id]) == ""


def test_long_texts_tokenize_the_same_off_the_event_loop(tokenizer: Tokenizer) -> None:
    text = "hello 🦜 " * 5000
    assert _incremental(tokenizer, tokenizer.encode(text)) == text
