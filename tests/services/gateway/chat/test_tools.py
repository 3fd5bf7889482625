from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.chat.tools import Tool, ToolMode, ToolUse, argument_json, parse_arguments


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        ({"type": "string"}, "3", '"3"'),
        ({}, "true", '"true"'),
        (True, "[1]", '"[1]"'),
        ({"type": "integer"}, "3", "3"),
        ({"type": "integer"}, "3.0", "3"),
        ({"type": "integer"}, "3.5", '"3.5"'),
        ({"type": "integer"}, "three", '"three"'),
        ({"type": "number"}, "3", "3"),
        ({"type": "number"}, " 2.50 ", "2.5"),
        ({"type": "number"}, "NaN", '"NaN"'),
        ({"type": "boolean"}, "True", "true"),
        ({"type": "boolean"}, "false", "false"),
        ({"type": "array"}, '["é"]', '["é"]'),
        ({"type": "array"}, r'["\ud83d", "é"]', '["\ufffd", "é"]'),
        ({"type": "object"}, '{"a": {"b": null}}', '{"a": {"b": null}}'),
        ({"type": ["string", "null"]}, "None", "null"),
        ({"type": ["string", "null"]}, "nothing", '"nothing"'),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", "null"),
        ({"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/flag"}]}, "true", "true"),
        ({"enum": [1, "auto"]}, "1", "1"),
        ({"enum": [1, "auto"]}, "auto", '"auto"'),
        ({"const": False}, "false", "false"),
        ({"type": "number"}, "1e308", "1e+308"),
        ({"type": "number"}, "1e309", "1.7976931348623157e+308"),
        ({"type": "array"}, "[-1e999]", "[-1.7976931348623157e+308]"),
        ({"$ref": "#/$defs/loop"}, "7", '"7"'),
    ],
)
def test_arguments_have_the_types_of_the_schema(schema: Any, text: str, expected: str) -> None:
    definitions = {"flag": {"type": "boolean"}, "loop": {"$ref": "#/$defs/loop"}}
    tool = Tool("f", parameters={"type": "object", "properties": {"x": schema}, "$defs": definitions})
    assert argument_json(text, tool.arguments.types_of("x")) == expected


@pytest.mark.parametrize(
    ("tool", "sentence"),
    [
        (Tool("a" * 65), r"tools\[0\]\.function\.name must be 1 to 64 letters, digits"),
        (Tool("f", parameters={"type": "array"}), "must be a JSON schema of type 'object'"),
        (Tool("f", parameters={"properties": {"a": 3}}), "properties must hold schemas, but 'a' is none"),
    ],
)
def test_tools_that_cannot_be_called(tool: Tool, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tool.check("tools[0]")


def test_only_the_allowed_tools_may_be_called() -> None:
    tools = (Tool("a"), Tool("b"), Tool("c"))
    use = ToolUse.of(tools, ToolMode.AUTO, None, None, ["c", "a"])
    use.check()
    assert [tool.name for tool in use.callable_tools] == ["a", "c"]
    assert (use.is_forced, use.is_enforced) == (False, True)
    assert ToolUse.of(tools, ToolMode.REQUIRED, None, None, ["c"]).is_forced
    with pytest.raises(ValueError, match=r"tool_choice names the function 'd'; the tools are 'a', 'b', 'c'\."):
        ToolUse.of(tools, ToolMode.AUTO, None, None, ["a", "d"]).check()
    with pytest.raises(ValueError, match="tool_choice of type 'allowed_tools' must name at least one function"):
        ToolUse.of(tools, ToolMode.AUTO, None, None, []).check()
    with pytest.raises(ValueError, match="tool_choice may only be given together with tools"):
        ToolUse.of((), ToolMode.AUTO, None, None, ["a"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"city": "Par', {"city": "Par"}),
        ('{"city": "Rome", "days', {"city": "Rome"}),
        ('{"city": "Rome", "days": ', {"city": "Rome"}),
        ('{"days": [1, {"a": tru', {"days": [1, {}]}),
        ("{", {}),
    ],
)
def test_arguments_that_were_cut_off_may_be_sent_back(text: str, value: dict[str, Any]) -> None:
    assert json.loads(parse_arguments(text, "arguments")) == value


@pytest.mark.parametrize("text", ['{"a": }', "{a: 1}", "[1", '{"a": 1} x', "x", '"a', "5", '{"a": 1}{', '{"a": 1e999}'])
def test_arguments_with_another_mistake_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^arguments must be a JSON object as a string, not "):
        parse_arguments(text, "arguments")
