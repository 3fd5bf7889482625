"""A `ToolChoice` is a `tool_choice` of OpenAI's API that is an object; `tool_use` reads all fields about tool calls.

Both forms of each object are accepted: the form of chat completions, and the flat form of the Responses API.

| chat completions | Responses API |
|---|---|
| `{"type": "function", "function": {"name": "f"}}` | `{"type": "function", "name": "f"}` |
| `{"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [...]}}` | the same without `allowed_tools` |
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from services.gateway.chat.tools import Tool, ToolMode, ToolUse, parse_tool_mode
from services.gateway.request_body import BaseBody


class FunctionName(BaseBody):
    name: str


class NamedTool(BaseBody):
    """A `NamedTool` names one function, in one of two forms."""

    type: Literal["function"]
    function: FunctionName | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _check_name(self) -> NamedTool:
        _check_one_name(self.function, self.name)
        return self

    @property
    def function_name(self) -> str:
        return self.function.name if self.function is not None else self.name or ""


class AllowedTools(BaseBody):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoice(BaseBody):
    """A `ToolChoice` names the function that must be called, or the functions that may be called."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    name: str | None = None
    allowed_tools: AllowedTools | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[NamedTool] | None = None

    @model_validator(mode="after")
    def _check_form(self) -> ToolChoice:
        is_subset = self.allowed_tools is not None or self.mode is not None or self.tools is not None
        if self.type == "function":
            _check_one_name(self.function, self.name)
            if is_subset:
                raise ValueError("may hold allowed_tools, mode and tools only if its type is 'allowed_tools'")
        elif self.function is not None or self.name is not None:
            raise ValueError("may name a function only if its type is 'function'")
        elif (self.allowed_tools is not None) == (self.mode is not None and self.tools is not None):
            raise ValueError('must hold allowed_tools as {"mode": "auto" or "required", "tools": [...]}')
        return self

    @property
    def function_name(self) -> str | None:
        return self.function.name if self.function is not None else self.name

    @property
    def subset(self) -> AllowedTools | None:
        """Return the tools that may be called, or None if the client named one function."""
        if self.mode is not None and self.tools is not None:
            return AllowedTools(mode=self.mode, tools=self.tools)
        return self.allowed_tools


def _check_one_name(function: FunctionName | None, name: str | None) -> None:
    if (function is None) == (name is None):
        raise ValueError('must name one function, as {"type": "function", "function": {"name": "..."}}')


def tool_use(tools: tuple[Tool, ...], choice: str | ToolChoice | None, is_parallel: bool | None) -> ToolUse:
    """Return the `ToolUse` for `tools`, `tool_choice` and `parallel_tool_calls`. Raises ValueError if they conflict."""
    if not isinstance(choice, ToolChoice):
        return ToolUse.of(tools, None if choice is None else parse_tool_mode(choice), None, is_parallel)
    if (subset := choice.subset) is None:
        return ToolUse.of(tools, None, choice.function_name, is_parallel)
    names = [tool.function_name for tool in subset.tools]
    return ToolUse.of(tools, ToolMode(subset.mode), None, is_parallel, names)


def function_use(functions: tuple[Tool, ...], choice: str | FunctionName | None) -> ToolUse:
    """Return the `ToolUse` for `functions` and `function_call` of OpenAI's older API, where an answer has one call."""
    if isinstance(choice, FunctionName):
        return ToolUse.of(functions, None, choice.name, is_parallel=False)
    mode = None if choice is None else parse_tool_mode(choice, "function_call")
    return ToolUse.of(functions, mode, None, is_parallel=False)
