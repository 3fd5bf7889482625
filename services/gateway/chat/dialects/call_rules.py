"""A `CallRules` holds the grammar rules for the tool calls of an answer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

from services.engine.contract.sampling_params import JSON_OPTIONS
from services.gateway.chat.markers import Marker
from services.gateway.chat.tools import Tool, ToolUse
from services.gateway.schema.counted_chars import CountedChars

MAX_RULES = 2**17  # characters of all rules; the engine accepts no longer grammar


def spelled(marker: Marker) -> str:
    """Return the grammar expression for `marker`: a string, or the token id of an added token."""
    return json.dumps(marker.text) if marker.token_id is None else f"<[{marker.token_id}]>"


def json_rule(schema: Any) -> str:
    """Return the grammar expression for JSON text that matches `schema`, in keywords that llguidance knows."""
    return f"%json {json.dumps(schema | JSON_OPTIONS if isinstance(schema, dict) else schema)}"


class CallRules(ABC):
    """A `CallRules` makes the rules `calls`, `call` and `call_rest`, for the grammar of an answer.

    - `calls`: all calls of an answer that holds nothing else. `call`: one section of calls. `call_rest`: a section
      without the marker that begins the section.
    - `more`: the expression for what may follow `call_rest` in an answer that holds only calls.
    - `is_relaxed`: if True, the rules enforce only the types of the arguments of tools that are not strict. The caller
      sets `is_relaxed` if the grammar of the whole schemas cannot be used.
    - `counted`: counts the characters of lengths and repetitions, and starts at the count of the answer's own grammar.

    Raises ValueError if a strict tool's schema cannot be expressed, if an enum's value cannot be written, or if the
    rules become too long.
    """

    def __init__(self, counted: CountedChars, is_relaxed: bool) -> None:
        self.rules: list[str] = []
        self.more = ""
        self._num_chars, self._counted, self._is_relaxed = 0, counted, is_relaxed
        self._shared: dict[str, str] = {}  # names of rules, by their expressions

    def _add(self, rule: str) -> None:
        self._num_chars += len(rule)
        if self._num_chars > MAX_RULES:
            raise ValueError(
                f"tools make a grammar of more than {MAX_RULES} characters; give fewer tools, or smaller schemas."
            )
        self.rules.append(rule)

    def _add_functions(self, tool_use: ToolUse) -> None:
        """Add the rule `function`, which stands for a call of any function that may be called."""
        names = {tool.name for tool in tool_use.callable_tools}
        numbered = [(n, tool) for n, tool in enumerate(tool_use.tools) if tool.name in names]
        self._add(f"function: {' | '.join(f'function_{n}' for n, _ in numbered)}")
        # The rules of strict tools are made first, so that strict tools have the first claim to counted characters.
        for n, tool in sorted(numbered, key=lambda one: not one[1].is_strict):
            self._add_function(n, tool)

    @abstractmethod
    def _add_function(self, n: int, tool: Tool) -> None:
        """Add the rules of a call of `tool`, the tool with the index `n`; their names begin with `function_{n}`."""

    def _share(self, expression: str, prefix: str) -> str:
        """Return the name of a rule for `expression`; equal expressions share one rule."""
        if expression not in self._shared:
            self._shared[expression] = f"{prefix}_{len(self._shared)}"
            self._add(f"{self._shared[expression]}: {expression}")
        return self._shared[expression]
