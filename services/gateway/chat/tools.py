"""A `Tool` is a function that the model may call; `argument_json` converts arguments that are untyped text to JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from json import JSONDecoder
from typing import Any

import pydantic_core

from services.gateway.schema.json_size import check_text_size
from services.gateway.schema.json_text import dumps, loads, mend_escapes, mend_text, nearest_float
from services.gateway.schema.object_schema import ObjectSchema
from services.gateway.schema.references import type_of

MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
PYTHON_SPELLINGS = {"True": True, "False": False, "None": None}


class ToolMode(StrEnum):
    """A `ToolMode` says whether the model may, must not or must call tools, as `tool_choice` does in OpenAI's API."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True)
class Tool:
    """A `Tool` is a function that the client offers to the model."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)  # JSON schema of the arguments, of type object
    is_strict: bool = False  # True: calls must match the schema even if the request does not force a call

    def check(self, param: str) -> None:
        """Raise ValueError if the tool's name or schema is invalid.

        `param` is the name of the client's parameter that holds the tool, for the error message.
        """
        if not TOOL_NAME.fullmatch(self.name):
            allowed = "1 to 64 letters, digits, '_', '-' or '.'"
            raise ValueError(f"{param}.function.name must be {allowed}, not {self.name!r:.100}.")
        path = f"{param}.function.parameters"
        properties, required = self.parameters.get("properties"), self.parameters.get("required")
        is_object = self.parameters.get("type") in (None, "object")
        if not is_object or not (properties is None or isinstance(properties, dict)):
            raise ValueError(f"{path} must be a JSON schema of type 'object'.")
        if not (required is None or (isinstance(required, list) and all(isinstance(name, str) for name in required))):
            raise ValueError(f"{path}.required must be a list of names, not {required!r:.100}.")
        for name, schema in self.arguments.properties.items():
            if not isinstance(schema, dict | bool):
                raise ValueError(f"{path}.properties must hold schemas, but {name!r:.100} is none.")

    @cached_property
    def arguments(self) -> ObjectSchema:
        """Return the schema of the tool's arguments."""
        return ObjectSchema(self.parameters)

    def to_template(self) -> dict[str, Any]:
        """Return the tool as a JSON object in OpenAI's form, which chat templates expect.

        Templates read the keywords of the schema without a check, and would fail at null.
        """
        parameters = {key: value for key, value in self.parameters.items() if value is not None}
        if "properties" in self.parameters or not self.parameters:
            parameters = {"type": "object", "properties": {}} | parameters
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """A `ToolUse` holds the tools of one request, and says whether and how often the model may call the tools."""

    tools: tuple[Tool, ...] = ()
    mode: ToolMode = ToolMode.AUTO
    function: str | None = None  # name of the function that must be called; None: the client named none
    is_parallel: bool = True  # True: one answer may hold several calls
    allowed: tuple[str, ...] | None = None  # names of the functions that may be called; None: all of `tools`

    @classmethod
    def of(
        cls,
        tools: tuple[Tool, ...],
        mode: ToolMode | None,
        function: str | None,
        is_parallel: bool | None,
        allowed: Sequence[str] | None = None,
    ) -> ToolUse:
        """Return the `ToolUse` for a client's parameters; None stands for a missing parameter.

        - `mode`: the value of `tool_choice`, or of the mode inside `tool_choice`.
        - `function`: the name of the function that `tool_choice` names.
        - `is_parallel`: the value of `parallel_tool_calls`, which has no effect without tools.
        - `allowed`: the names of the functions in a `tool_choice` of type `allowed_tools`.

        Raises ValueError if a parameter needs tools but `tools` is empty.
        """
        if not tools and (function is not None or allowed is not None or mode not in (None, ToolMode.NONE)):
            raise ValueError("tool_choice may only be given together with tools.")
        names = None if allowed is None else tuple(allowed)
        return cls(tools, mode or ToolMode.AUTO, function, is_parallel is not False, names)

    @property
    def is_forced(self) -> bool:
        """Return True if the answer must hold at least one tool call."""
        return self.mode is ToolMode.REQUIRED or self.function is not None

    @property
    def max_calls(self) -> int | None:
        """Return the maximum number of tool calls in one answer, or None if the number is not limited.

        A function that the client names is called exactly once, as in OpenAI's API.
        """
        return 1 if self.function is not None or not self.is_parallel else None

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Return the tools of the request that the model may call, which depend on `tool_choice`."""
        if self.mode is ToolMode.NONE:
            return ()
        names = [self.function] if self.function is not None else self.allowed
        return self.tools if names is None else tuple(tool for tool in self.tools if tool.name in names)

    @property
    def is_enforced(self) -> bool:
        """Return True if a grammar must make every call of the answer valid."""
        if self.mode is ToolMode.NONE:
            return False
        return self.is_forced or self.allowed is not None or any(tool.is_strict for tool in self.callable_tools)

    def check(self) -> None:
        """Raise ValueError if a tool cannot be called, or if the named function is not among the tools."""
        if len(self.tools) > MAX_TOOLS:
            raise ValueError(f"tools must hold at most {MAX_TOOLS} functions, not {len(self.tools)}.")
        for index, tool in enumerate(self.tools):
            tool.check(f"tools[{index}]")
        names = [tool.name for tool in self.tools]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"tools must hold each function once, but names {repeated[0]!r} twice.")
        if self.allowed == ():
            raise ValueError("tool_choice of type 'allowed_tools' must name at least one function.")
        chosen = (self.function,) if self.function is not None else self.allowed or ()
        if unknown := [name for name in chosen if name not in names]:
            known = ", ".join(map(repr, names))
            raise ValueError(f"tool_choice names the function {unknown[0]!r:.100}; the tools are {known:.1000}.")


def is_string_type(types: frozenset[str] | None) -> bool:
    """Return True if `types` allow only strings; an argument without types (None) is treated as a string."""
    return types is None or types == {"string"}


def argument_json(text: str, types: frozenset[str] | None) -> str:
    """Return the JSON value of an argument that the model wrote as untyped text.

    If `types` allow another type than string and the text is a value of that type, the result is this value. Otherwise
    the result is a JSON string.
    """
    if is_string_type(types):
        return dumps(text)
    assert types is not None
    try:
        value = _parse(text.strip(), types)
    except ValueError:
        return dumps(text)  # text that has none of the allowed types reaches the client as an unchanged string
    return dumps(value)


def _parse(text: str, types: frozenset[str]) -> object:
    # A grammar allows numbers of any size, and the client must get a number where its schema asks for one.
    value: Any = PYTHON_SPELLINGS[text] if text in PYTHON_SPELLINGS else loads(text, _refuse, nearest_float)
    kind = type_of(value)
    if kind == "number" and "number" not in types and "integer" in types and float(value).is_integer():
        return int(value)
    if kind in types or (kind == "integer" and "number" in types):
        return value
    raise ValueError(kind)


def _refuse(name: str) -> None:
    raise ValueError(name)  # json.loads would accept NaN and Infinity, which are not JSON


def parse_arguments(text: str, param: str) -> str:
    """Return the arguments `text` of an earlier tool call, formatted as JSON.

    Clients send back a call in which the answer reached its maximum length. Of such a call, the arguments up to the cut
    are returned. Raises ValueError if `text` is not a JSON object; the message names the parameter `param`.
    """
    check_text_size(text, param)
    try:
        value = loads(text.strip() or "{}")
    except ValueError:
        value = _cut_off(text)
    if not isinstance(value, dict):
        raise ValueError(f"{param} must be a JSON object as a string, not {text[:100]!r:.100}.")
    return dumps(value)


def _cut_off(text: str) -> object:
    """Return the value of JSON text that ends too early, or None if something else is wrong with the text."""
    text = mend_escapes(mend_text(text))
    try:
        value = pydantic_core.from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return None
    try:
        JSONDecoder().raw_decode(text.strip())
    except ValueError:
        return value
    return None  # the value is complete, so more text follows it


def parse_tool_mode(mode: str, param: str = "tool_choice") -> ToolMode:
    """Return the `ToolMode` with the name `mode`. Raises ValueError for an unknown mode; the message names `param`."""
    if mode not in list(ToolMode):
        allowed = ", ".join(repr(str(known)) for known in ToolMode)
        raise ValueError(f"{param} must be {allowed} or name a function, not {mode!r:.100}.")
    return ToolMode(mode)


def tools_by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    return {tool.name: tool for tool in tools}
