from __future__ import annotations

import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from services.gateway.chat.text import Chat, ChatMessage, Detokenizer, StopMatcher, Tokenizer
from tests.services.gateway.echo import save_tokenizer


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
        token_ids = [rng.randrange(262) for _ in range(30)] + ids  # ends in a whole character
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


def test_chat_template(tokenizer: Tokenizer) -> None:
    chat = Chat((ChatMessage("system", "be brief"), ChatMessage("user", "hello")))
    expected = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(chat) == expected
    with pytest.raises(ValueError, match="messages do not fit the model's chat template: the first message may not"):
        tokenizer.render(Chat((ChatMessage("user", "refuse"),)))
    with pytest.raises(ValueError, match="messages must hold at least one message"):
        tokenizer.render(Chat(()))


def test_no_chat_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="messages cannot be used because the model has no chat template"):
        Tokenizer(tmp_path).render(Chat((ChatMessage("user", "hi"),)))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold a tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"The tokenizer in .* cannot be loaded"):
        Tokenizer(tmp_path)


def test_a_tokenizer_without_bytes_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="must be byte-level"):
        Tokenizer(tmp_path)


def _first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow definition: the shortest beginning of the text that ends in a stop string, without that string."""
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ended))], True
    return text, False


def _match(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        new, is_stopped = matcher.push(piece)
        shown += new
        if is_stopped:
            return shown, True
        text = "".join(pieces)
        held = matcher._held
        assert text.startswith(shown + held)
        assert not held or any(stop.startswith(held) for stop in stops), "held back without need"
    return shown + matcher.flush(), False


def test_stop_strings_wherever_the_text_is_cut() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(14)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(5)))
        pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        assert _match(pieces, stops) == _first_stop(text, stops)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["<end>"])
    pushed = [matcher.push(piece) for piece in ["a<", "en", "x", "<", "b"]]
    assert pushed == [("a", False), ("", False), ("<enx", False), ("", False), ("<b", False)]


def test_matching_is_linear_in_the_worst_case() -> None:
    matcher = StopMatcher(["a" * 20_000 + "b"])
    start = time.thread_time()
    matcher.push("a" * 200_000)
    assert time.thread_time() - start < 5
