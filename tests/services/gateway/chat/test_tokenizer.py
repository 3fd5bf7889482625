from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from services.gateway.chat.conversation import ChatMessage, Conversation
from services.gateway.chat.tokenizer import Tokenizer
from tests.services.gateway.echo import save_tokenizer


def test_chat_template(tokenizer: Tokenizer) -> None:
    chat = Conversation((ChatMessage("system", "be brief"), ChatMessage("user", "hello")))
    expected = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(chat) == expected
    with pytest.raises(ValueError, match="messages do not fit the model's chat template: the first message may not"):
        tokenizer.render(Conversation((ChatMessage("user", "refuse"),)))
    with pytest.raises(ValueError, match="messages must hold at least one message"):
        tokenizer.render(Conversation(()))


@pytest.mark.parametrize("expression", ["1 // depth", "'a' + depth", "'%d' % 'a'", "{}.pop(depth)"])
def test_a_template_that_cannot_use_an_argument(tmp_path: Path, expression: str) -> None:
    save_tokenizer(tmp_path, chat_template=f"{{{{ {expression} }}}}")
    chat = Conversation((ChatMessage("user", "hi"),), template_kwargs={"depth": 0})
    with pytest.raises(ValueError, match="messages do not fit the model's chat template"):
        Tokenizer(tmp_path).render(chat)


def test_no_chat_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="messages cannot be used because the model has no chat template"):
        Tokenizer(tmp_path).render(Conversation((ChatMessage("user", "hi"),)))


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


def test_the_ids_of_a_marker_are_those_of_all_tokens_in_which_it_may_be_written(tokenizer: Tokenizer) -> None:
    def texts(marker: str) -> list[list[str]]:
        return [tokenizer.texts(token_ids) for token_ids in tokenizer.marker_ids(marker)]

    assert texts("<|im_end|>") == [["<|im_end|>"]]
    assert texts("l>h") == [["l", "hel", "ll"], [">"], ["h", "he", "hel"]]
    assert texts("he") == [["he", "hel"]]


def test_tokens_of_white_space(tokenizer: Tokenizer) -> None:
    blank = tokenizer.blank_ids()
    assert {tokenizer.decode([token_id]) for token_id in blank} >= {" ", "\n", "\t"}
    assert all(tokenizer.decode([token_id]).isspace() for token_id in blank)
