from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from services.engine.contract.sampling_params import Grammar
from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.gateway.chat.tokenizer import Tokenizer
from tests.services.gateway.chat_formats import FORMATS, ChatFormat, write_model


@dataclass(frozen=True)
class FormatWorld:
    """A `FormatWorld` holds one chat format with a tokenizer and a grammar compiler for it."""

    name: str
    chat_format: ChatFormat
    tokenizer: Tokenizer
    compiler: GrammarCompiler

    def allows(self, grammar: Grammar, text: str) -> bool:
        """Return True if the grammar allows each token of the text and, after the last token, the end of the answer."""
        state, end = self.compiler.compile(grammar).start(), self.chat_format.eos_id
        for token_id in [*self.tokenizer.encode(text, add_special_tokens=False), end]:
            if not state.allowed(self.tokenizer.vocab_size, frozenset([end]), frozenset())[token_id]:
                return False
            state.push(token_id)
        return True


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FormatWorld]:
    """Return a world for each chat format."""

    def world(name: str, chat_format: ChatFormat) -> FormatWorld:
        path: Path = write_model(tmp_path_factory.mktemp(name), chat_format)
        return FormatWorld(name, chat_format, Tokenizer(path), GrammarCompiler(path, [chat_format.eos_id]))

    return {name: world(name, chat_format) for name, chat_format in FORMATS.items()}


@pytest.fixture(params=FORMATS)
def world(worlds: dict[str, FormatWorld], request: pytest.FixtureRequest) -> FormatWorld:
    """Return the world of each chat format in turn."""
    return worlds[request.param]
