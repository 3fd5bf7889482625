"""The tests check which arguments the grammar of calls in JSON allows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.chat.grammars import GrammarBuilder
from services.gateway.chat.tools import Tool, ToolMode, ToolUse
from services.gateway.schema.budget import SchemaBudget
from tests.services.gateway.chat.dialects.conftest import FormatWorld

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
ONE = {"properties": {"x": INTEGER}, "required": ["x"]}
NODE = {"type": "object", "properties": {"x": INTEGER, "next": {"$ref": "#/$defs/Node"}}, "required": ["x"]}


def allows(world: FormatWorld, parameters: dict[str, Any], is_strict: bool, *arguments: Any) -> list[bool]:
    """Return, for each of the `arguments`, True if a forced call of a tool with the schema `parameters` may have it."""
    budget = SchemaBudget(4096, 128 << 10)
    builder = GrammarBuilder(world.tokenizer.dialect, budget, world.compiler.check)
    use = ToolUse((Tool("f", parameters=parameters, is_strict=is_strict),), ToolMode.REQUIRED)
    grammar = builder.build(None, "", use, False)
    assert grammar is not None
    texts = [world.chat_format.write_calls([("f", json.dumps(value))]) for value in arguments]
    return [world.allows(grammar, text) for text in texts]


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({}, [{}], [{"a": 1}, []]),
        ({"type": "object"}, [{}, {"a": [None]}], [3]),
        ({"type": "object", "properties": None, "required": None}, [{}, {"a": 1}], [3]),
        ({"properties": {"a": INTEGER}}, [{}, {"a": 1}], [{"a": "1"}, {"b": 1}]),
        ({"properties": {"a": INTEGER}, "additionalProperties": TEXT}, [{"b": "x"}], [{"b": 1}]),
        ({"properties": {"a": INTEGER}, "additionalProperties": True}, [{"a": 1, "b": [1]}], [{"a": "x"}]),
        ({"properties": {"a": INTEGER}, "required": ["a", "b"]}, [{"a": 1, "b": "x"}], [{"a": 1}, {"b": 2}]),
        ({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}, [{"x": 1, "next": {"x": 2}}], [{}, {"x": 1, "next": {}}]),
        (
            {"allOf": [NODE | {"properties": {"x": INTEGER}}, {"properties": {"y": TEXT}}]},
            [{"x": 1, "y": "z"}],
            [{"y": "z"}],
        ),
        (
            {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": INTEGER}},
            [{"a": 1}, {"b": 1}],
            [{}],
        ),
        (
            {"patternProperties": {"^k[0-9]$": INTEGER}, "additionalProperties": False},
            [{"k1": 1}],
            [{"k1": "x"}, {"a": 1}],
        ),
        (
            {"properties": {"a": {"enum": ["</parameter>", "```", "<｜tool▁calls▁end｜>"]}}},
            [{"a": "```"}],
            [{"a": "``"}],
        ),
        ({"properties": {"a>b <c>": INTEGER}}, [{"a>b <c>": 1}], [{"a>b <c>": "x"}]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_the_whole_schema_is_enforced(
    worlds: dict[str, FormatWorld], parameters: dict[str, Any], good: list[Any], bad: list[Any], is_strict: bool
) -> None:
    for name in ("deepseek-v3", "deepseek-v31", "qwen3-next"):
        assert allows(worlds[name], parameters, is_strict, *good) == [True] * len(good)
        assert allows(worlds[name], parameters, is_strict, *bad) == [False] * len(bad)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (
            {"type": "array", "contains": {}},
            r"^tools\[0\]\.function\.parameters\.properties\.a\.contains is not",
        ),
        ({"$ref": "#/$defs/No"}, r"properties\.a\.\$ref refers to '#/\$defs/No', which does not exist"),
        ({"type": "string", "pattern": "a(?=b)"}, r"properties\.a\.pattern 'a\(\?=b\)' looks ahead"),
        ({"type": "string", "maxLength": 20_000}, r"properties\.a\.maxLength counts 20000 characters"),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_strict_tools_and_ignored_in_others(
    worlds: dict[str, FormatWorld], schema: dict[str, Any], sentence: str
) -> None:
    world, parameters = worlds["deepseek-v31"], {"properties": {"a": schema, "b": INTEGER}, "required": ["b"]}
    with pytest.raises(ValueError, match=sentence):
        allows(world, parameters, True)
    value = [1] if schema.get("type") == "array" else "x"
    assert allows(world, parameters, False, {"a": value, "b": 1}, {"b": 1}, {"b": "x"}) == [True, True, False]


def test_a_schema_that_is_too_large_leaves_the_types(worlds: dict[str, FormatWorld]) -> None:
    properties = {f"p{n}": {"enum": ["é" * 600, n]} for n in range(40)}
    world, parameters = worlds["deepseek-v3"], {"properties": properties | {"q": INTEGER}, "required": ["q"]}
    with pytest.raises(ValueError, match="tools make a grammar of more than 131072 characters"):
        allows(world, parameters, True)
    good, bad = {"p1": "other", "q": 3}, [{"p1": [], "q": 3}, {"q": "x"}, {}, {"q": 3, "r": 1}]
    assert allows(world, parameters, False, good, *bad) == [True, False, False, False, False]
