"""The tests check which texts the composed grammars allow, with the engine's grammar compiler."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest

from model.demo import DEMO
from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.gateway.chat import grammars
from services.gateway.chat.dialects.dialect import Dialect
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.chat.tools import ToolMode, ToolUse
from tests.services.gateway.weather import ANY, CALL, CALL_ANY, CALL_NOW, NOW, WEATHER

REQUIRED = ToolUse((WEATHER, NOW, ANY), ToolMode.REQUIRED)
THOUGHT = "hm\nso </thin\n</think>\n\n"
CASES = [
    (REQUIRED, CALL, True),
    (REQUIRED, CALL_NOW, True),
    (REQUIRED, CALL_ANY, True),
    (REQUIRED, f"{CALL}\n{CALL_NOW}", True),
    (REQUIRED, "hi", False),
    (REQUIRED, "", False),
    (REQUIRED, CALL.replace("\n3\n", "\nthree\n"), False),
    (REQUIRED, CALL.replace("\nF\n", "\nK\n"), False),
    (REQUIRED, CALL.replace("\nab\n", "\nabcdef\n"), False),
    (REQUIRED, CALL.replace("city", "town"), False),
    (ToolUse((WEATHER, NOW), function="now"), CALL_NOW, True),
    (ToolUse((WEATHER, NOW), function="now"), CALL, False),
    (ToolUse((WEATHER, NOW), function="now"), f"{CALL_NOW}\n{CALL_NOW}", False),
    (ToolUse((NOW,), ToolMode.REQUIRED, is_parallel=False), f"{CALL_NOW}\n{CALL_NOW}", False),
    (ToolUse((WEATHER, NOW)), "plain text <tool", True),
    (ToolUse((WEATHER, NOW)), "", True),
    (ToolUse((WEATHER, NOW)), f"look:\n{CALL}", True),
    (ToolUse((WEATHER, NOW)), f"a {CALL_NOW}\n{CALL_NOW} b", True),
    (ToolUse((WEATHER, NOW)), "a <tool_call>\nfoo", False),
    (ToolUse((ANY, NOW), allowed=("now",)), f"a {CALL_NOW}", True),
    (ToolUse((ANY, NOW), allowed=("now",)), f"a {CALL_ANY}", False),
]


@dataclass(frozen=True)
class GrammarWorld:
    """A `GrammarWorld` holds a tokenizer, its grammar compiler, and the id of the token that ends an answer."""

    tokenizer: Tokenizer
    compiler: GrammarCompiler
    end: int

    @property
    def dialect(self) -> Dialect:
        return self.tokenizer.dialect

    def allows(self, grammar: Grammar, text: str) -> bool:
        """Return True if the grammar allows each token of the text and, after the last token, the end of the answer."""
        state, vocab_size = self.compiler.compile(grammar).start(), self.tokenizer.vocab_size
        for token_id in self.tokenizer.encode(text):
            if not state.allowed(vocab_size, frozenset([self.end]), frozenset())[token_id]:
                return False
            state.push(token_id)
        return bool(state.allowed(vocab_size, frozenset([self.end]), frozenset())[self.end])


@pytest.fixture(scope="module")
def worlds(model_dir: Path) -> dict[bool, GrammarWorld]:
    """Return a grammar world for each of two tokenizers.

    - True: the demo model's tokenizer, in which the markers are special tokens.
    - False: the small tokenizer, in which the markers are ordinary text.
    """
    made = {is_special: Tokenizer(path) for is_special, path in [(True, DEMO), (False, model_dir)]}
    ends = {is_special: tokenizer.marker("<|im_end|>").token_id for is_special, tokenizer in made.items()}
    return {
        is_special: GrammarWorld(
            made[is_special], GrammarCompiler(path, [ends[is_special] or 0]), ends[is_special] or 0
        )
        for is_special, path in [(True, DEMO), (False, model_dir)]
    }


@pytest.mark.parametrize("reasons", [True, False])
@pytest.mark.parametrize("is_special", [True, False])
def test_calls(worlds: dict[bool, GrammarWorld], is_special: bool, reasons: bool) -> None:
    world = worlds[is_special]
    assert world.dialect.calls_start.token_id == (7 if is_special else None)
    for use, text, is_allowed in CASES:
        grammar = grammars.compose(None, use, reasons, world.dialect)
        assert grammar is not None
        assert world.allows(grammar, (THOUGHT if reasons else "") + text) == is_allowed, (use, text)


ANSWER_FORMATS = [
    (Grammar(GrammarKind.REGEX, r"a/b\/c\n[0-9]+"), "a/b/c\n12", "a/b/c"),
    (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object", "required": ["a"]}'), '{"a": 3}', "{}"),
    (Grammar(GrammarKind.LARK, 'start: x "}"\nx: /[{]+/\n'), "{{}", "{"),
    (grammars.any_of(['é"', "b\n"]), "b\n", "c"),
    (Grammar(GrammarKind.JSON_OBJECT), '{"b": []}', "3"),
]


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(("answer_format", "good", "bad"), ANSWER_FORMATS)
def test_an_answers_form_holds_after_the_reasoning_and_beside_tools(
    worlds: dict[bool, GrammarWorld], answer_format: Grammar, good: str, bad: str, is_special: bool
) -> None:
    world = worlds[is_special]
    assert grammars.compose(answer_format, ToolUse(), False, world.dialect) is answer_format
    for reasons, use in product([True, False], [ToolUse(), ToolUse((NOW,))]):
        grammar = grammars.compose(answer_format, use, reasons, world.dialect)
        assert grammar is not None
        for text, is_allowed in [(good, True), (bad, False), (CALL_NOW, bool(use.tools))]:
            allowed = world.allows(grammar, (THOUGHT if reasons else "") + text)
            assert allowed == is_allowed, (reasons, use, text)


@pytest.mark.parametrize("is_special", [True, False])
def test_a_tool_call_may_end_the_reasoning_if_there_are_tools(
    worlds: dict[bool, GrammarWorld], is_special: bool
) -> None:
    world = worlds[is_special]
    [schema] = [answer for answer, _, _ in ANSWER_FORMATS if answer.kind is GrammarKind.JSON_SCHEMA]
    forced, strict = ToolUse((NOW, ANY), ToolMode.REQUIRED), ToolUse((NOW, replace(ANY, is_strict=True)))
    one, either = replace(forced, is_parallel=False), replace(strict, is_parallel=False)
    for answer, use, text, is_allowed in [
        (None, forced, f"hm {CALL_NOW}", True),
        (None, forced, f"hm {CALL_NOW}\n{CALL_ANY}", True),
        (None, forced, f"hm {CALL_NOW}.", False),
        (None, forced, "hm <tool_call> is how calls begin</think>", False),
        (None, one, f"hm {CALL_NOW}\n{CALL_NOW}", False),
        (None, one, f"hm <tool_c</think>{CALL_NOW}", True),
        (None, strict, f"hm {CALL_NOW} and", True),
        (None, strict, f"hm {CALL_NOW} and {CALL_ANY}", True),
        (None, strict, "hm <tool_call>", False),
        (None, either, f"hm {CALL_NOW} {CALL_NOW}", False),
        (schema, strict, f"hm {CALL_NOW}", True),
        (schema, strict, 'hm</think>{"a": 3}', True),
        (schema, ToolUse(), 'hm <tool_call> </think>{"a": 3}', not is_special),
    ]:
        grammar = grammars.compose(answer, use, True, world.dialect)
        assert grammar is not None
        assert world.allows(grammar, text) == is_allowed, (answer, use, text)


def test_free_text_has_no_grammar(worlds: dict[bool, GrammarWorld]) -> None:
    dialect = worlds[True].dialect
    assert grammars.compose(None, ToolUse(), True, dialect) is None
    assert grammars.compose(None, ToolUse((NOW,)), True, dialect) is None
    assert grammars.compose(None, ToolUse((WEATHER,), ToolMode.NONE), True, dialect) is None


def test_a_mistake_is_told_with_the_clients_parameter(compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs\.regex cannot be used: unclosed group\."):
        asyncio.run(grammars.check(Grammar(GrammarKind.REGEX, "a("), "structured_outputs.regex", compiler.check))
