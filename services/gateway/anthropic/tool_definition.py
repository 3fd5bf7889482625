"""A `ToolDefinition` is a tool in Anthropic's form, and a `ToolSelection` says which tools the model may call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from services.gateway.chat.tools import Tool, ToolMode, ToolUse
from services.gateway.request_body import BaseBody
from services.gateway.schema.json_text import dumps

MODES = {"auto": ToolMode.AUTO, "any": ToolMode.REQUIRED, "none": ToolMode.NONE, "tool": None}


class ToolDefinition(BaseBody):
    """A `ToolDefinition` is a tool that the client runs; tools that Anthropic's servers run have other types."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[str] | None = None
    # The following fields have no effect: the prefix cache needs no hints, and every tool stands in the prompt.
    cache_control: dict[str, Any] | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None

    @field_validator("allowed_callers")
    @classmethod
    def _check_callers(cls, callers: list[str] | None) -> list[str] | None:
        if callers is not None and "direct" not in callers:
            raise ValueError("must hold 'direct', because this server runs no code that could call the tool")
        return callers

    def tool(self) -> Tool:
        description = self.description or ""
        if self.input_examples:
            examples = "\n".join(dumps(example) for example in self.input_examples)
            description = f"{description}\n\nExamples of its input:\n{examples}".lstrip()
        return Tool(self.name, description, self.input_schema, self.strict or False)


class ToolSelection(BaseBody):
    """A `ToolSelection` is the field `tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolSelection:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("must hold a name if, and only if, its type is 'tool'")
        return self


def tool_use(tools: Sequence[ToolDefinition], choice: ToolSelection | None) -> ToolUse:
    """Return how the model may use `tools`. Raises ValueError if `choice` needs tools, but there are none."""
    if choice is None:
        return ToolUse(tuple(tool.tool() for tool in tools))
    is_parallel = (
        None if choice.disable_parallel_tool_use is None or not tools else not choice.disable_parallel_tool_use
    )
    return ToolUse.of(tuple(tool.tool() for tool in tools), MODES[choice.type], choice.name, is_parallel)
