"""The tests let the demo model's grammar choose tokens at random, and validate the arguments of the calls.

`jsonschema`, an independent implementation of JSON Schema, says which arguments are right.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from model.demo import DEMO
from services.engine.contract.sampling_params import MAX_COUNTED_CHARS, Grammar, GrammarKind
from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.gateway.chat.answer_parser import AnswerParser
from services.gateway.chat.dialects.xml_dialect import XmlDialect
from services.gateway.chat.grammars import GrammarBuilder
from services.gateway.chat.markers import Marker
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.chat.tool_call_delta import ToolCallDelta
from services.gateway.chat.tools import Tool, ToolMode, ToolUse
from services.gateway.schema.budget import SchemaBudget

TOKENIZER = Tokenizer(DEMO)
XML = XmlDialect(lambda text: Marker(text, None))  # finds markers in the text, without token ids
END = TOKENIZER.marker("<|im_end|>").token_id or 0
COMPILER = GrammarCompiler(DEMO, [END])
BUILDER = GrammarBuilder(TOKENIZER.dialect, SchemaBudget(4096, 128 << 10), COMPILER.check)
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
MAX_TOKENS = 400
DEFINITIONS = {
    "Colour": {"enum": ["red", "deep blue"], "title": "Colour", "type": "string"},
    "Level": {"enum": [1, 2], "type": "integer"},
    "Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    "Cat": {
        "type": "object",
        "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
        "required": ["kind"],
    },
    "Dog": {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]},
    # as Pydantic writes a class whose tag has a default, which refers to itself
    "Leaf": {
        "type": "object",
        "properties": {"tag": {"const": "leaf", "default": "leaf"}},
        "additionalProperties": False,
    },
    "Branch": {
        "type": "object",
        "properties": {"tag": {"const": "branch", "default": "branch"}, "next": {"$ref": "#/$defs/Tree"}},
        "additionalProperties": False,
    },
    "Tree": {
        "oneOf": [{"$ref": "#/$defs/Leaf"}, {"$ref": "#/$defs/Branch"}],
        "discriminator": {"propertyName": "tag", "mapping": {"leaf": "#/$defs/Leaf", "branch": "#/$defs/Branch"}},
    },
    "Text": {"anyOf": [{"$ref": "#/$defs/Colour"}, {"pattern": "^x+$"}], "type": "string"},
}
# Schemas of one argument. Every answer of the grammar must match.
SCHEMAS: list[Any] = [
    {"type": "string", "pattern": "^\\d{2}$", "maxLength": 2},
    {"type": "string", "pattern": "[a-c]{3}", "maxLength": 12},
    {"type": "string", "pattern": "(^a|b)\\w$", "maxLength": 5},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time", "maxLength": 25},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "email", "maxLength": 20},
    {"type": "string", "contentEncoding": "base64", "minLength": 4, "maxLength": 12},
    {"type": "string", "minLength": 3, "maxLength": 6},
    {"type": "string", "enum": ["a/b", 'c"d', "é\n"]},
    {"const": " x "},
    {"$ref": "#/$defs/Colour"},
    {"$ref": "#/$defs/Text", "maxLength": 3},
    {"allOf": [{"$ref": "#/$defs/Colour"}], "default": "red"},
    {"anyOf": [{"const": "on"}, {"const": "off"}]},
    {"oneOf": [{"const": "on", "title": "On"}, {"const": "off"}, {"const": "off"}]},
    {"type": "string", "oneOf": [{"pattern": "^a"}, {"pattern": "b$"}], "maxLength": 4},
    {"type": "string", "enum": ["a", "b", "c"], "not": {"const": "b"}},
    {"type": "string", "maxLength": 4, "not": {"pattern": "[^a-z]"}},
    {"type": "string", "maxLength": 5, "if": {"pattern": "^a"}, "then": {"minLength": 5}, "else": {"maxLength": 1}},
    {"allOf": [{"$ref": "#/$defs/Level"}]},
    {"allOf": [{"$ref": "#/$defs/Point"}], "description": "A point."},
    {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[0-9a]{1,3}$"}]},
    {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
    {"enum": ["1", 1, None, "null", True]},
    {"type": "array", "items": {"enum": ["</parameter>", 'x"</parameter>\\']}, "minItems": 1, "maxItems": 2},
    {"type": "array", "items": {"$ref": "#/$defs/Colour"}, "uniqueItems": True, "minItems": 2},
    {
        "type": "object",
        "properties": {"at": {"type": "string", "format": "date"}},
        "required": ["at"],
        "maxProperties": 1,
    }
    | {"additionalProperties": False},
    {"type": "object", "propertyNames": {"pattern": "^k[0-9]$"}, "additionalProperties": {"type": "integer"}}
    | {"minProperties": 1, "maxProperties": 2},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "boolean"}},
    {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
        "required": ["kind"],
        "additionalProperties": False,
        "if": {"properties": {"kind": {"const": "a"}}},
        "then": {"required": ["n"]},
        "else": {"properties": {"n": False}},
    },
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
        "additionalProperties": False,
        "dependentRequired": {"a": ["b"]},
    },
    {"type": "object", "propertyNames": False, "properties": {"a": {}}},
    {
        "type": "object",
        "propertyNames": {"maxLength": 1},
        "unevaluatedProperties": {"type": "integer"},
        "minProperties": 1,
    },
    {"oneOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
    {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
    {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "discriminator": {"propertyName": "kind"}},
    {"$ref": "#/$defs/Tree"},
    {"type": "integer", "minimum": 3, "not": {"minimum": 8}},
    {"not": {"type": ["string", "number", "object", "array"]}},
    {"type": "array", "items": [{"type": "boolean"}], "additionalItems": False, "minItems": 1},
]


def call_of(text: str, use: ToolUse) -> list[ToolCallDelta]:
    parser = AnswerParser(XML, False, use.callable_tools, use.is_forced, use.max_calls)
    parts = [parser.push(text), parser.finish()]
    assert [part.content for part in parts] == ["", ""], text
    return [delta for part in parts for delta in part.calls]


def walk(use: ToolUse, seed: int) -> str:
    """Return the text of an answer whose tokens are chosen at random from those that the grammar allows."""
    rng, grammar = random.Random(seed), BUILDER.build(None, "", use, False)
    assert grammar is not None
    state, tokens = COMPILER.compile(grammar).start(), list[int]()
    while len(tokens) < MAX_TOKENS:
        allowed = np.flatnonzero(state.allowed(TOKENIZER.vocab_size, frozenset([END]), frozenset()))
        assert len(allowed), (state.failure, TOKENIZER.decode(tokens))
        # Prefer what ends a value, so that values of any length do not take too long.
        texts = [token for token in allowed if b"<" in TOKENIZER.spelling(token) or b'"' in TOKENIZER.spelling(token)]
        token = int(rng.choice(texts if texts and rng.random() < 0.2 else allowed))
        if token == END:
            break
        tokens.append(token)
        state.push(token)
    return TOKENIZER.decode(tokens)


def tool(schema: Any, is_strict: bool) -> Tool:
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": DEFINITIONS}
    return Tool("f", parameters=parameters, is_strict=is_strict)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_forced_and_strict_calls_match_their_schema(schema: Any) -> None:
    validator = jsonschema.Draft202012Validator({**schema, "$defs": DEFINITIONS}, format_checker=CHECKER)
    if isinstance(schema.get("items"), list):
        validator = jsonschema.Draft7Validator({**schema, "$defs": DEFINITIONS})
    num_whole = 0
    for seed in range(6):
        use = ToolUse((tool(schema, is_strict=seed % 2 == 0),), ToolMode.REQUIRED, is_parallel=False)
        text = walk(use, seed)
        if not text.endswith("</tool_call>"):
            continue  # the walk was too long
        num_whole += 1
        arguments = json.loads("".join(delta.arguments for delta in call_of(text, use)))
        validator.validate(arguments["x"])
        if "contentEncoding" in schema:
            assert len(arguments["x"]) % 4 == 0
    assert num_whole >= 3


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"type": "string", "pattern": "a(?=b)"}, r"properties\.x\.pattern 'a\(\?=b\)' looks ahead with '\(\?='\."),
        ({"type": "string", "format": "idn-email"}, r"properties\.x\.format 'idn-email' is not supported\."),
        ({"type": "array", "contains": {"const": 1}}, r"properties\.x\.contains is not supported\."),
        ({"type": "array", "uniqueItems": True}, r"properties\.x\.uniqueItems is supported only for an array whose"),
        ({"$ref": "#/$defs/Nothing"}, r"properties\.x\.\$ref refers to '#/\$defs/Nothing', which does not exist\."),
        ({"$ref": "http://a/b"}, r"properties\.x\.\$ref must begin with '#/' and refer to the same schema, not 'http"),
        ({"type": "strin"}, r"properties\.x\.type must be one or more of array, boolean, .* not 'strin'\."),
        ({"type": "string", "minLength": 3, "maxLength": 2}, r"minLength allows at least 3 and at most 2 characters"),
        (
            {"type": "object", "not": {"patternProperties": {}}},
            r"properties\.x\.not is not supported with 'patternProp",
        ),
        (
            {"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]},
            "^tools cannot be used: oneOf is supported only if no value can match two of its options",
        ),
    ],
)
def test_what_a_grammar_cannot_express_is_refused_in_strict_tools_and_ignored_in_others(
    schema: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        BUILDER.build(None, "", ToolUse((tool(schema, is_strict=True),)), False)
    assert not any(word in str(refused.value) for word in ("guidance", "lenient", "coerce"))
    use = ToolUse((tool(schema, is_strict=False),), ToolMode.REQUIRED, is_parallel=False)
    grammar = BUILDER.build(None, "", use, False)
    assert grammar is not None
    assert grammar.kind is GrammarKind.LARK


def test_a_value_with_the_marker_of_calls_is_refused_by_name() -> None:
    for is_strict, mode in [(True, ToolMode.AUTO), (False, ToolMode.REQUIRED)]:
        schema = {"enum": ["a", "b</parameter>c"]}
        sentence = r"^tools\[0\]\.function\.parameters\.properties\.x\.enum holds 'b</parameter>c', but no argument can"
        with pytest.raises(ValueError, match=sentence):
            BUILDER.build(None, "", ToolUse((tool(schema, is_strict),), mode), False)
    assert BUILDER.build(None, "", ToolUse((tool(schema, is_strict=False),)), False) is None
    for value in ("</tool_call>", "<tool_call>", "</function>", "<parameter=x>", "</think>"):
        use = ToolUse((tool({"enum": [value]}, is_strict=True),), ToolMode.REQUIRED, is_parallel=False)
        [*deltas] = call_of(walk(use, 0), use)
        assert json.loads("".join(delta.arguments for delta in deltas)) == {"x": value}


def is_allowed(grammar: Grammar, text: str) -> bool:
    """Return True if `grammar` allows each token of `text` and then the end. Raises ValueError if it gives up."""
    state = COMPILER.compile(grammar).start()
    for token in [*TOKENIZER.encode(text), END]:
        if not state.allowed(TOKENIZER.vocab_size, frozenset([END]), frozenset())[token]:
            if state.failure.startswith("The grammar is too complex"):
                raise ValueError(state.failure)
            return False
        state.push(token)
    return True


@pytest.mark.parametrize("longest", [200, 3_900])
@pytest.mark.parametrize(
    ("shortest", "value", "allows"),
    [
        (0, "short", True),
        (0, "", True),
        (0, "</parameter\n</par<</parameter </paramete", True),
        (0, "</parameter>", False),
        (20, "</parameter>" * 2, False),
        (20, "short", False),
        (20, "</parameter " * 2, True),
    ],
)
def test_a_counted_argument_ends_at_any_length(longest: int, shortest: int, value: str, allows: bool) -> None:
    schema = {"type": "string", "minLength": shortest, "maxLength": longest}
    use = ToolUse((tool(schema, is_strict=True),), ToolMode.REQUIRED, is_parallel=False)
    grammar = BUILDER.build(None, "", use, False)
    assert grammar is not None
    text = "<tool_call>\n<function=f>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert is_allowed(grammar, text.format(value)) == allows


ALL_SCRIPTS = "a\u00e9\u0436\u0e01\u4e2d\ud7ff\ufb01\U0001f600\U00020000\U000e0001 hello world, "  # needs most states


@pytest.mark.parametrize("is_raw", [True, False], ids=["string", "JSON"])
def test_a_text_may_be_as_long_as_all_that_is_counted(is_raw: bool) -> None:
    value = (ALL_SCRIPTS * MAX_COUNTED_CHARS)[:MAX_COUNTED_CHARS]
    string = {"type": "string", "maxLength": MAX_COUNTED_CHARS}
    use = ToolUse((tool(string if is_raw else {"type": "array", "items": string}, is_strict=True),), ToolMode.REQUIRED)
    grammar = BUILDER.build(None, "", use, False)
    assert grammar is not None
    shown = value if is_raw else json.dumps([value], ensure_ascii=False)
    text = "<tool_call>\n<function=f>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert is_allowed(grammar, text.format(shown))
    assert not is_allowed(grammar, text.format(shown.replace(value, value + "x")))


def test_an_answer_may_be_as_long_as_all_its_strings_that_are_counted() -> None:
    sizes = {f"p{n}": MAX_COUNTED_CHARS // 4 - n for n in range(4)}
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": size} for name, size in sizes.items()},
        "required": list(sizes),
        "additionalProperties": False,
    }
    answer = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    grammar = BUILDER.build(answer, "response_format", ToolUse(), False)
    assert grammar is not None
    assert grammar.num_counted == sum(sizes.values())
    value = {name: (ALL_SCRIPTS * size)[:size] for name, size in sizes.items()}
    assert is_allowed(grammar, json.dumps(value, ensure_ascii=False))
    assert not is_allowed(grammar, json.dumps(value | {"p3": value["p3"] + "x"}, ensure_ascii=False))


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "maxLength": 4_001}, "maxLength counts 4001 characters"),
        ({"type": "string", "minLength": 10**9}, "minLength counts 1000000000 characters"),
        ({"type": "string", "pattern": "^(?:[a-z]{20} ){200}$"}, "pattern counts 4200 characters"),
        ({"type": "string", "pattern": "^\\p{L}{3000}$"}, "pattern counts 24000 characters"),
        (
            {"type": "array", "items": {"type": "string", "maxLength": 20_000}},
            "items.maxLength counts 20000 characters",
        ),
        ({"type": "object", "propertyNames": {"maxLength": 20_000}}, "propertyNames.maxLength counts 20000 characters"),
        (
            {"type": "object", "patternProperties": {"^.{4000}.$": {}}},
            "patternProperties counts 4001 characters",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused_by_keyword_or_ignored(schema: Any, keyword: str) -> None:
    sentence = f"{keyword}, but all lengths and repetitions of a request together may count 4000, of which 0 are used."
    for mode in (ToolMode.AUTO, ToolMode.REQUIRED):
        with pytest.raises(ValueError, match=re.escape(f"properties.x.{sentence}") + "$"):
            BUILDER.build(None, "", ToolUse((tool(schema, is_strict=True),), mode), False)
    answer = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    with pytest.raises(ValueError, match=re.escape(f"response_format cannot be used: {sentence}") + "$"):
        BUILDER.build(answer, "response_format", ToolUse(), False)
    grammar = BUILDER.build(None, "", ToolUse((tool(schema, is_strict=False),), ToolMode.REQUIRED), False)
    assert grammar is not None
    assert grammar.num_counted == 0


def test_all_strings_of_a_request_count_together_and_equal_ones_once() -> None:
    def strings(is_strict: bool, *sizes: int) -> Tool:
        properties = {f"x{n}": {"type": "string", "maxLength": size} for n, size in enumerate(sizes)}
        return Tool(f"f{sizes[0]}", parameters={"type": "object", "properties": properties}, is_strict=is_strict)

    equal = BUILDER.build(None, "", ToolUse((strings(True, *[1250] * 9),)), False)
    assert equal is not None
    assert equal.num_counted == 1250
    with pytest.raises(
        ValueError, match=r"^tools\[1\].function.parameters.properties.x1.maxLength counts 1501 .* 2750 are"
    ):
        BUILDER.build(None, "", ToolUse((strings(True, 1250), strings(True, 1500, 1501))), False)
    ignored = BUILDER.build(None, "", ToolUse((strings(False, 2250), strings(True, 2000)), ToolMode.REQUIRED), False)
    assert ignored is not None
    assert ignored.num_counted == 2000, "what a strict tool counts comes first"


def test_text_holds_no_end_of_an_argument() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=x>\n{}\n</parameter>\n</function>\n</tool_call>"
    use = ToolUse((tool({"type": "string", "minLength": 2}, is_strict=True),), ToolMode.REQUIRED, is_parallel=False)
    grammar = BUILDER.build(None, "", use, False)
    assert grammar is not None
    for value, allows in [("ab", True), ("a", False), ("a</parameter>", False), ("</para\n", True), ("a\n", True)]:
        assert is_allowed(grammar, text.format(value)) == allows, value


def test_a_schema_at_the_top_may_be_a_reference_and_hold_null() -> None:
    node = {"type": "object", "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}}}
    parameters: Any = {"$ref": "#/$defs/Node", "$defs": {"Node": node | {"required": ["x"]}}, "properties": None}
    one = Tool("f", parameters=parameters | {"required": None}, is_strict=True)
    one.check("tools[0]")
    assert one.to_template()["function"]["parameters"]["properties"] == {}
    assert "required" not in one.to_template()["function"]["parameters"]
    use = ToolUse((one,), ToolMode.REQUIRED, is_parallel=False)
    texts = [walk(use, seed) for seed in range(4)]
    whole = [text for text in texts if text.endswith("</tool_call>")]
    assert whole
    for text in whole:
        arguments = json.loads("".join(delta.arguments for delta in call_of(text, use)))
        jsonschema.validate(arguments, {**node, "$defs": {"Node": node}, "required": ["x"]})
    with pytest.raises(ValueError, match=r"tools\[0\]\.function\.parameters\.anyOf is not supported at the top of a"):
        BUILDER.build(None, "", ToolUse((Tool("f", parameters={"anyOf": [{}]}, is_strict=True),)), False)


def test_a_schema_that_refers_to_itself_allows_what_its_other_options_allow() -> None:
    text = {"anyOf": [{"$ref": "#/$defs/Text"}, {"const": "a"}, {"pattern": "^b$"}], "type": "string"}
    parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/Text"}}, "$defs": {"Text": text}}
    use = ToolUse((Tool("f", parameters=parameters | {"required": ["x"]}, is_strict=True),), ToolMode.REQUIRED)
    texts = ["".join(delta.arguments for delta in call_of(walk(use, seed), use))[:10] for seed in range(12)]
    assert set(texts) == {'{"x": "a"}', '{"x": "b"}'}


def test_small_schemas_cannot_become_large_grammars() -> None:
    itself = {"anyOf": [{"$ref": "#/properties/x"}] * 200 + [{"type": "integer"}]}
    use = ToolUse((Tool("f", parameters={"type": "object", "properties": {"x": itself}}),), ToolMode.REQUIRED)
    grammar = BUILDER.build(None, "", use, False)
    assert grammar is not None
    assert len(grammar.text) < 2000
    doubling = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)}
    definitions = doubling | {"d60": {"type": "string", "pattern": "^a$"}}
    for negated in ({"$ref": "#/$defs/d0"}, {"type": "string", "not": {"$ref": "#/$defs/d0"}}):
        parameters = {"type": "object", "properties": {"x": negated, "y": {"type": "array", "items": negated}}}
        use = ToolUse((Tool("f", parameters=parameters | {"$defs": definitions}),), ToolMode.REQUIRED)
        grammar = BUILDER.build(None, "", use, False)
        assert grammar is not None
        assert len(grammar.text) < 20_000


def test_parameters_share_their_definitions() -> None:
    shared = {"Big": {"type": "object", "properties": {f"k{n}": {"enum": ["x" * 50]} for n in range(800)}}}
    properties = {f"p{n}": {"$ref": "#/$defs/Big"} for n in range(500)}
    parameters = {"type": "object", "properties": properties, "$defs": shared}
    use = ToolUse((Tool("f", parameters=parameters, is_strict=True),))
    grammar = BUILDER.build(None, "", use, False)
    assert grammar is not None
    assert len(grammar.text) < 150_000
    different = {
        name: {"type": "array", "items": schema, "maxItems": n} for n, (name, schema) in enumerate(properties.items())
    }
    strict = Tool("f", parameters=parameters | {"properties": different}, is_strict=True)
    with pytest.raises(ValueError, match="tools make a grammar of more than 131072 characters"):
        BUILDER.build(None, "", ToolUse((strict,)), False)
    relaxed = Tool("f", parameters=parameters | {"properties": different})
    assert BUILDER.build(None, "", ToolUse((relaxed,), ToolMode.REQUIRED), False) is not None


def test_schemas_have_a_budget() -> None:
    for schema, sentence in [
        ({"anyOf": [{} for _ in range(5000)]}, "is too large: JSON schemas may hold 4096 objects and lists"),
        ({"enum": ["x" * 200_000]}, "is too large: JSON schemas may hold 131072 bytes of text"),
    ]:
        with pytest.raises(ValueError, match=r"^tools\[0\]\.function\.parameters " + sentence):
            BUILDER.build(None, "", ToolUse((tool(schema, is_strict=True),)), False)
        assert BUILDER.build(None, "", ToolUse((tool(schema, is_strict=False),)), False) is None
    described = {"type": "string", "description": "x" * 200_000}
    assert BUILDER.build(None, "", ToolUse((tool(described, is_strict=True),)), False) is not None
