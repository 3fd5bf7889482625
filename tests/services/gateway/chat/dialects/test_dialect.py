"""The tests check for every chat format that answers are read and constrained in the same way."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jsonschema
import numpy as np
import pytest

from services.engine.contract.sampling_params import Grammar, GrammarKind, SamplingParams
from services.engine.contract.token_output import FinishReason, TokenOutput
from services.gateway.chat import grammars
from services.gateway.chat.answer_parser import AnswerParser
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.grammars import GrammarBuilder
from services.gateway.chat.output_processor import OutputProcessor
from services.gateway.chat.text_delta import TextDelta, join
from services.gateway.chat.tools import Tool, ToolMode, ToolUse
from services.gateway.schema.budget import SchemaBudget
from tests.services.gateway.chat.dialects.conftest import FormatWorld
from tests.services.gateway.weather import ANY, ARGUMENTS, NOW, WEATHER

TOOLS = (WEATHER, NOW, ANY)
WEATHER_CALL = ("get_weather", json.dumps(ARGUMENTS, ensure_ascii=False))
NOW_CALL = ("now", "{}")
FORCED = ToolUse(TOOLS, ToolMode.REQUIRED)
FREE = ToolUse(tuple(replace(tool, is_strict=False) for tool in TOOLS))
MAX_TOKENS = 400
SCHEMAS: list[Any] = [
    {"type": "string", "pattern": "^\\d{2}$", "maxLength": 2},
    {"type": "string", "enum": ["a/b", 'c"d', "é\n", "```", "<｜tool▁call▁end｜>", "</tool_call>", "</think>"]},
    {"type": "string", "format": "date"},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    {"type": "array", "items": {"$ref": "#/$defs/Point"}, "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False},
]
DEFINITIONS = {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}


def answer(world: FormatWorld, tokens: list[int], use: ToolUse, in_reasoning: bool = False, size: int = 1) -> TextDelta:
    """Return the whole choice for an engine that generates `tokens`, `size` of them in each step."""
    opens = world.tokenizer.dialect.opens_reasoning and not in_reasoning
    choice = ChoiceRequest([1], SamplingParams(), in_reasoning, use, opens_reasoning=opens)
    processor, deltas = OutputProcessor(0, choice, world.tokenizer), list[TextDelta]()
    for n in range(0, len(tokens), size):
        some = tuple(tokens[n : n + size])
        reason = FinishReason.STOP if n + size >= len(tokens) else None
        deltas.append(processor.push(TokenOutput("r", some, reason, 1, n + len(some))))
        if deltas[-1].finish_reason:
            break
    return join(deltas)


def said(world: FormatWorld, text: str, use: ToolUse, **given: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """Return content, reasoning and calls of an answer, whose parts must not depend on the number of tokens a step."""
    tokens = [*world.tokenizer.encode(text, add_special_tokens=False), world.chat_format.eos_id]
    found = []
    for size in (1, 3, len(tokens)):
        whole = answer(world, tokens, use, size=size, **given)
        calls = [(call.name, json.loads(call.arguments)) for call in whole.calls]
        assert [call.index for call in whole.calls] == list(range(len(calls)))
        found.append((whole.text, whole.reasoning, calls))
    assert found[0] == found[1] == found[2]
    return found[0]


def test_calls_are_read(world: FormatWorld) -> None:
    write = world.chat_format.write_calls
    both = [("get_weather", ARGUMENTS), ("now", {})]
    for use in (FORCED, FREE):
        assert said(world, write([WEATHER_CALL, NOW_CALL]), use) == ("", "", both)
        thought = f"Hm.\n</think>\n\n{write([WEATHER_CALL])}\n"
        assert said(world, thought, use, in_reasoning=True) == ("", "Hm.", both[:1])
        assert said(world, f"Hm.\n{write([NOW_CALL])}", use, in_reasoning=True) == ("", "Hm.", both[1:])
    assert said(world, f"Look:\n{write([NOW_CALL])}\n\nDone.", FREE) == ("Look:Done.", "", both[1:])
    one = replace(FREE, is_parallel=False)
    assert said(world, write([NOW_CALL, WEATHER_CALL]), one) == ("", "", both[1:])


def test_what_is_no_call_is_text(world: FormatWorld) -> None:
    write = world.chat_format.write_calls
    unknown, cut = write([("unknown", "{}")]), write([WEATHER_CALL])[:-30]
    for text in (unknown, cut, f"a {unknown} b"):
        assert said(world, text, FREE) == (text, "", [])
    assert said(world, f"{unknown}</think>So.", FREE, in_reasoning=True) == ("So.", unknown, [])
    content, _, calls = said(world, f"{write([NOW_CALL])}\n{unknown}", FREE)
    assert (content, calls) == (unknown, [("now", {})])
    content, _, calls = said(world, f"{unknown}{write([NOW_CALL])}", FREE)
    assert (content, calls) == (unknown, [("now", {})])


def test_a_marker_is_a_token(world: FormatWorld) -> None:
    """Check that a marker spelled in ordinary tokens is text; in an answer only the model's own token is a marker."""
    dialect = world.tokenizer.dialect
    for marker in (dialect.think_end, *dialect.call_markers):
        assert marker.token_id is not None
        assert world.tokenizer.decode([marker.token_id]) == marker.text
        assert world.tokenizer.marker_ids(marker.text) == ((marker.token_id,),)
    call = world.chat_format.write_calls([NOW_CALL])
    spelled = [token for char in f"</think>{call}" for token in world.tokenizer.encode(char, add_special_tokens=False)]
    tokens = [*spelled, *world.tokenizer.encode(f"</think>{call}", add_special_tokens=False), world.chat_format.eos_id]
    whole = answer(world, tokens, FREE, in_reasoning=True)
    assert (whole.reasoning, whole.text) == (f"</think>{call}", "")
    assert [one.name for one in whole.calls] == ["now"]


def test_a_marker_inside_a_section_of_calls_is_a_token(world: FormatWorld) -> None:
    """Check that each marker of a call must be the model's own token, and that nothing is lost if it is not."""
    encode, end = world.tokenizer.encode, world.chat_format.eos_id
    call = world.chat_format.write_calls([NOW_CALL])
    tokens = encode(call, add_special_tokens=False)
    start, *inner = world.tokenizer.dialect.call_markers
    markers = {marker.token_id for marker in inner}
    places = [n for n, token in enumerate(tokens) if token in markers]
    assert {tokens[n] for n in places} == markers
    assert tokens[0] == start.token_id
    for n in places:
        marker = world.tokenizer.decode([tokens[n]])
        spelled = [token for char in marker for token in encode(char, add_special_tokens=False)]
        whole = answer(world, [*tokens[:n], *spelled, *tokens[n + 1 :], end], FREE)
        # In DeepSeek's formats the calls before the end of the section are complete without this end.
        is_called = marker == "<｜tool▁calls▁end｜>"
        assert [one.name for one in whole.calls] == ["now"] * is_called, marker
        assert whole.text == (marker if is_called else call)
        value = json.dumps({"x": marker})
        whole = answer(world, [*encode(world.chat_format.write_calls([("log", value)]), False), end], FREE)
        assert [json.loads(one.arguments) for one in whole.calls] == [{"x": marker}]


def test_calls_of_all_kinds_of_requests_are_constrained(world: FormatWorld) -> None:
    write, dialect = world.chat_format.write_calls, world.tokenizer.dialect
    weather, now = write([WEATHER_CALL]), write([NOW_CALL])
    wrong = write([("get_weather", json.dumps(ARGUMENTS | {"unit": "K"}))])
    named, one = ToolUse(TOOLS, function="now"), replace(FORCED, is_parallel=False)
    strict, allowed = ToolUse((WEATHER, NOW)), ToolUse((ANY, NOW), allowed=("now",))
    for use, text, is_allowed in [
        (FORCED, weather, True),
        (FORCED, write([WEATHER_CALL, NOW_CALL, NOW_CALL]), True),
        (FORCED, write([("log", '{"a b": "x"}')]), True),
        (FORCED, wrong, False),
        (FORCED, write([("get_weather", "{}")]), False),
        (FORCED, write([("get_weather", '{"city": "x", "town": "y"}')]), False),
        (FORCED, "text", False),
        (FORCED, "", False),
        (named, now, True),
        (named, weather, False),
        (named, write([NOW_CALL, NOW_CALL]), False),
        (one, weather, True),
        (one, write([NOW_CALL, NOW_CALL]), False),
        (strict, "text", True),
        (strict, f"Look: {weather}", True),
        (strict, f"Look: {wrong}", False),
        (strict, weather[:-10], False),
        (allowed, now, True),
        (allowed, write([("log", "{}")]), False),
    ]:
        for reasons in (False, True):
            grammar = grammars.compose(None, use, reasons, dialect)
            assert grammar is not None
            thought = "so\n</think>\n\n" if reasons else ""
            assert world.allows(grammar, thought + text) == is_allowed, (use, text, reasons)
        # The last grammar begins in reasoning, which a call ends.
        assert world.allows(grammar, f"so {text}") == (is_allowed and dialect.calls_start.text in text), (use, text)


def test_an_answers_form_holds_beside_calls(world: FormatWorld) -> None:
    form, now = Grammar(GrammarKind.JSON_OBJECT), world.chat_format.write_calls([NOW_CALL])
    grammar = grammars.compose(form, ToolUse((NOW,)), False, world.tokenizer.dialect)
    assert grammar is not None
    for text, is_allowed in [('{"a": 1}', True), (now, True), ("text", False), (f'{{"a": 1}}{now}', False)]:
        assert world.allows(grammar, text) == is_allowed, text


def walk(world: FormatWorld, use: ToolUse, seed: int, in_reasoning: bool) -> list[int]:
    """Return the tokens of an answer, chosen at random from the tokens that the grammar of `use` allows."""
    budget = SchemaBudget(4096, 128 << 10)
    grammar = GrammarBuilder(world.tokenizer.dialect, budget, world.compiler.check).build(None, "", use, in_reasoning)
    assert grammar is not None
    state, rng, end, tokens = world.compiler.compile(grammar).start(), random.Random(seed), world.chat_format.eos_id, []
    while len(tokens) < MAX_TOKENS:
        allowed = np.flatnonzero(state.allowed(world.tokenizer.vocab_size, frozenset([end]), frozenset()))
        assert len(allowed), (state.failure, world.tokenizer.decode(tokens))
        # Prefer what ends a value or the reasoning, so that values of any length do not take too long.
        ends = [token for token in allowed if set(b'<"') & set(world.tokenizer.spelling(token))]
        markers = [token for token in ends if world.tokenizer.spelling(token) == b"</think>"]
        token = int(rng.choice(markers or ends if ends and rng.random() < 0.2 else allowed))
        tokens.append(token)
        if token == end:
            break
        state.push(token)
    return tokens


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_every_answer_that_a_grammar_allows_is_a_call_that_matches_its_schema(world: FormatWorld, schema: Any) -> None:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": DEFINITIONS}
    validator, num_whole = jsonschema.Draft202012Validator(parameters), 0
    for seed in range(6):
        use = ToolUse((Tool("f", parameters=parameters, is_strict=seed % 2 == 0),), ToolMode.REQUIRED)
        tokens = walk(world, replace(use, is_parallel=seed < 3), seed, in_reasoning=seed % 3 == 0)
        whole = answer(world, tokens, replace(use, is_parallel=seed < 3), in_reasoning=seed % 3 == 0)
        assert whole.text == ""
        calls = whole.calls if whole.finish_reason == "tool_calls" else whole.calls[:-1]
        for call in calls:
            validator.validate(json.loads(call.arguments))
            num_whole += 1
    assert num_whole >= 3


def test_pieces_of_any_length_give_the_same_parts(world: FormatWorld) -> None:
    kind = type(world.tokenizer.dialect)
    dialect = kind(lambda text: replace(world.tokenizer.marker(text), token_id=None))
    calls = world.chat_format.write_calls([WEATHER_CALL, NOW_CALL])
    text, rng = f"Hm </thi.\n</think>\n\nLook <tool:\n{calls}\nDone", random.Random(1)

    def parse(pieces: list[str], is_forced: bool) -> tuple[str, str, str]:
        parser = AnswerParser(dialect, True, TOOLS, is_forced)
        parts = [*map(parser.push, pieces), parser.finish()]
        deltas = [delta for part in parts for delta in part.calls]
        found = ["".join(part.content for part in parts), "".join(part.reasoning for part in parts)]
        return (
            found[0],
            found[1],
            json.dumps([(delta.index, delta.name) for delta in deltas if delta.id])
            + "".join(delta.arguments for delta in deltas),
        )

    for is_forced in (False, True):
        whole = parse([text], is_forced)
        assert whole[:2] == ("Look <tool:Done", "Hm </thi.")
        assert parse(list(text), is_forced) == whole
        for _ in range(30):
            cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(1, 12)))
            assert parse([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], is_forced) == whole


@pytest.mark.parametrize("start", ["<think>", "\n<think>\n"])
def test_an_answer_may_open_its_reasoning_itself_where_models_do(world: FormatWorld, start: str) -> None:
    call = world.chat_format.write_calls([NOW_CALL])
    text = f"{start}So.</think>\n\nYes.{call}"
    if world.tokenizer.dialect.opens_reasoning:  # as R1 and Qwen3 do
        assert said(world, text, FREE) == ("Yes.", "So.", [("now", {})])
        assert said(world, f"{start}So {call}", FREE) == ("", "So ", [("now", {})])
        assert said(world, " <thin", FREE) == (" <thin", "", [])
        assert said(world, f"a {start}b", FREE) == (f"a {start}b", "", [])
        spelled = [token for char in text for token in world.tokenizer.encode(char, add_special_tokens=False)]
        assert answer(world, [*spelled, world.chat_format.eos_id], FREE).text == text
    elif world.chat_format.added:
        content, reasoning, calls = said(world, text, FREE)
        assert (content, reasoning, calls) == (text.removesuffix(call), "", [("now", {})])
