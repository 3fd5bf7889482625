"""The tests send requests with tools over REST and gRPC to an engine with the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.services.gateway.surfaces import Surfaces, serving

USER = {"role": "user", "content": "hi"}
DEFINITIONS = {"Colour": {"enum": ["red", "blue"], "title": "Colour", "type": "string"}, "Level": {"type": "integer"}}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^\\d{2}$", "maxLength": 2},
        "day": {"type": "string", "format": "date"},
        "colour": {"$ref": "#/$defs/Colour"},
        "level": {"allOf": [{"$ref": "#/$defs/Level"}], "minimum": 0, "maximum": 9},
        "mode": {"anyOf": [{"const": "on"}, {"const": "off"}]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}], "maximum": 9, "minimum": 0},
    },
    "$defs": DEFINITIONS,
}
ITSELF = {"anyOf": [{"$ref": "#/properties/x"}] * 9 + [{"enum": ["a"]}]}  # as much as the model's context holds


@pytest.fixture(scope="module")
def surfaces() -> Iterator[Surfaces]:
    with serving() as surfaces:
        yield surfaces


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def body(parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters} | more.pop("function", {})
    forced = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0, "max_tokens": 200}
    return {"messages": [USER], "tools": [{"type": "function", "function": function}], **forced, **more}


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("names", [("code", "day"), ("colour", "level"), ("mode", "either")])
def test_every_constraint_of_an_argument_holds(surfaces: Surfaces, is_strict: bool, names: tuple[str, ...]) -> None:
    properties = {name: PARAMETERS["properties"][name] for name in names}
    parameters = PARAMETERS | {"properties": properties, "required": list(names)}
    for way, found in surfaces.ask_all(body(parameters, function={"strict": is_strict})).items():
        assert found.error is None, (way, found.error)
        [choice] = found.choices
        name, arguments = choice["calls"][0]
        assert (name, choice["finish"], choice["text"]) == ("f", "tool_calls", ""), way
        jsonschema.Draft202012Validator(
            parameters, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        ).validate(json.loads(arguments))


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        (
            body({"type": "object", "properties": {"x": {"enum": ["a</parameter>"]}}}),
            "tools[0].function.parameters.properties.x.enum holds 'a</parameter>', but no argument can contain",
        ),
        (
            body({"type": "object", "properties": {"x": {"pattern": "(a)\\1"}}}, function={"strict": True}),
            "tools[0].function.parameters.properties.x.pattern '(a)\\\\1' refers back to a group.",
        ),
        (
            {"messages": [USER], "response_format": response_format({"anyOf": [{}] * 5000})},
            "response_format.json_schema.schema is too large: JSON schemas may hold 4096 objects and lists.",
        ),
        (
            {"messages": [USER], "response_format": response_format({"contains": {}})},
            "response_format.json_schema.schema cannot be used: contains is not supported.",
        ),
        (
            body(
                {"type": "object", "properties": {"x": {"type": "string", "maxLength": 20000}}},
                function={"strict": True},
            ),
            "tools[0].function.parameters.properties.x.maxLength counts 20000 characters, but all lengths",
        ),
        (
            {"messages": [USER], "response_format": response_format({"type": "string", "minLength": 20000})},
            "response_format.json_schema.schema cannot be used: minLength counts 20000 characters, but all lengths",
        ),
    ],
    ids=["marker", "back reference", "budget", "response_format", "long argument", "long string"],
)
def test_refusals(surfaces: Surfaces, request_body: dict[str, Any], message: str) -> None:
    for found in (surfaces.rest(request_body, is_streamed=False), surfaces.grpc(request_body, is_streamed=False)):
        assert found.error is not None
        code, sentence = found.error
        assert code == "INVALID_ARGUMENT"
        assert sentence.startswith(message)


def test_a_value_with_the_name_of_a_special_token_is_an_argument(surfaces: Surfaces) -> None:
    parameters = {"type": "object", "properties": {"x": {"enum": ["</tool_call>"]}}, "required": ["x"]}
    for way, found in surfaces.ask_all(body(parameters)).items():
        [choice] = found.choices
        assert (choice["text"], json.loads(choice["calls"][0][1])) == ("", {"x": "</tool_call>"}), way


def test_a_schema_that_refers_to_itself_blocks_nobody(surfaces: Surfaces) -> None:
    parameters = {"type": "object", "properties": {"x": ITSELF}, "required": ["x"]}
    for way, found in surfaces.ask_all(body(parameters)).items():
        [choice] = found.choices
        assert json.loads(choice["calls"][0][1]) == {"x": "a"}, way


def test_null_in_a_schema_stands_for_nothing(surfaces: Surfaces) -> None:
    for way, found in surfaces.ask_all(body({"type": "object", "properties": None, "required": None})).items():
        assert found.error is None, (way, found.error)
