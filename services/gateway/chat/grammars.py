"""`compose` makes one grammar for a whole answer: its reasoning, its response format and its tool calls.

The grammars are in llguidance's dialect of Lark (see docs/syntax.md in llguidance's repository). Special tokens have no
text in llguidance's dialect, and a grammar refers to special tokens by their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.engine.contract.sampling_params import JSON_OPTIONS, Grammar, GrammarKind
from services.gateway.chat.markers import CALL_END, CALL_START, THINK_END, Marker
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.chat.tools import Tool, ToolUse, is_string_type

# A larger maxLength is not enforced, because the grammar's automaton needs one state for each character that it counts.
MAX_COUNTED_CHARS = 2000
TEXT = r"(?s:.*)"  # a regular expression for any text

# A function that raises ValueError if a grammar cannot be used; see
# `services.engine.grammar.grammar_checker.GrammarChecker.check`.
CheckGrammar = Callable[[Grammar], None]


@dataclass(frozen=True)
class Markers:
    """A `Markers` holds one tokenizer's markers for the end of reasoning, and the start and end of a tool call."""

    think_end: Marker
    call_start: Marker
    call_end: Marker

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Markers:
        return cls(tokenizer.marker(THINK_END), tokenizer.marker(CALL_START), tokenizer.marker(CALL_END))


def any_of(choices: Sequence[str]) -> Grammar:
    """Return a grammar that allows exactly one of the strings `choices`. Raises ValueError if `choices` is empty."""
    if not choices:
        raise ValueError("structured_outputs.choice must hold at least one string.")
    return Grammar(GrammarKind.LARK, f"start: {' | '.join(map(json.dumps, choices))}\n")


def check(grammar: Grammar, param: str, check_grammar: CheckGrammar) -> None:
    """Raise ValueError if `check_grammar` refuses `grammar`.

    The error message begins with `param`, the name of the client's parameter.
    """
    try:
        check_grammar(grammar)
    except ValueError as error:
        reason = str(error).partition(" ")[2]  # drop the first word, which is the engine's name for the parameter
        raise ValueError(f"{param} {reason}") from error


def compose(answer: Grammar | None, tool_use: ToolUse, in_reasoning: bool, markers: Markers) -> Grammar | None:
    """Return one grammar for the whole answer, or None if the answer may be any text.

    - `answer`: the grammar of the text after the reasoning; None if the client gave no grammar.
    - `tool_use`: the tools. If calls are forced, calls must match the tools' schemas. If the model may choose between
      text and calls, the grammar makes calls match the schemas only if at least one tool is strict, or if the client
      named the tools that may be called.
    - `in_reasoning`: True if the answer begins with reasoning, which ends at `</think>`.
    - `markers`: the markers of the model's tokenizer.
    """
    tools = tool_use.callable_tools
    if answer is None and not tool_use.is_enforced:
        return None
    if answer is not None and not tools and not in_reasoning:
        return answer
    rules = list(_call_rules(tools, tool_use.max_calls, markers)) if tools else []
    if answer is not None:
        rules.append(f"answer: {_expression(answer)}")
        start = "answer | calls" if tools else "answer"
    elif tool_use.is_forced:
        start = "calls"
    else:
        rules += _free_rules(markers.call_start)
        start = "free"
    if in_reasoning:
        rules.append(f"start: {_reasoning(markers.think_end)} GAP ({start})")
        rules += [r"GAP: /\n{0,2}/", _text_up_to("think", markers.think_end)]
    else:
        rules.append(f"start: {start}")
    return Grammar(GrammarKind.LARK, "\n".join(rules) + "\n")


def _expression(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return _json({"type": "object"})
        case GrammarKind.JSON_SCHEMA:
            return _json(json.loads(grammar.text))
        case GrammarKind.REGEX:
            return _regex(grammar.text)
    return f"%lark {{\n{grammar.text}\n}}"


def _json(schema: Any) -> str:
    return f"%json {json.dumps(schema | JSON_OPTIONS if isinstance(schema, dict) else schema)}"


def _regex(pattern: str) -> str:
    """Return the regular expression `pattern` between slashes, with every slash inside the pattern escaped."""
    escaped = re.sub(r"\\.|/", lambda found: found[0] if found[0] != "/" else r"\/", pattern, flags=re.DOTALL)
    return f"/{escaped}/".replace("\n", r"\n")


def _special(marker: Marker) -> str:
    return json.dumps(marker.text) if marker.special_id is None else f"<[{marker.special_id}]>"


def _text_up_to(rule: str, marker: Marker) -> str:
    """Return a grammar rule, named `rule`, for any text up to `marker`.

    The text ends with the marker if the marker is ordinary text. A marker that is a special token is not part of the
    text.
    """
    suffix = f"[suffix={json.dumps(marker.text)}]" if marker.special_id is None else ""
    return f"{rule}{suffix}: /{TEXT}/"


def _reasoning(marker: Marker) -> str:
    return "think" if marker.special_id is None else f"think {_special(marker)}"


def _free_rules(marker: Marker) -> list[str]:
    if marker.special_id is not None:
        return ["free: TEXT (call TEXT)*", f"TEXT: /{TEXT}/"]
    without = f"TEXT: /{TEXT}/ & ~/{TEXT}{re.escape(marker.text)}{TEXT}/"
    return ["free: (text_to_call call_rest)* TEXT", _text_up_to("text_to_call", marker), without]


def _call_rules(tools: Sequence[Tool], max_calls: int | None, markers: Markers) -> Iterator[str]:
    yield "calls: call" if max_calls == 1 else 'calls: call ("\\n" call)*'
    yield f"call: {_special(markers.call_start)} call_rest"
    yield f"call_rest: ({' | '.join(f'function_{n}' for n in range(len(tools)))}) {_special(markers.call_end)}"
    for n, tool in enumerate(tools):
        yield from _function_rules(f"function_{n}", tool)


def _function_rules(rule: str, tool: Tool) -> Iterator[str]:
    """Yield the grammar rules of a call of `tool`; the names of all rules begin with `rule`.

    The parameters must come in the order of the schema; optional parameters may be left out.
    """
    required = tool.parameters.get("required", ())
    parts = [f"{rule}_{n}" + ("" if name in required else "?") for n, name in enumerate(tool.properties)]
    if not tool.properties and tool.parameters.get("additionalProperties", bool(tool.parameters)):
        parts = [f"{rule}_any*"]
        yield f'{rule}_any: "<parameter=" /[^<>\\n]+/ ">\\n" {rule}_text "\\n"'
        yield f'{rule}_text[suffix="</parameter>"]: /{TEXT}/'
    body = " ".join(parts)
    yield f'{rule}: "\\n<function={tool.name}>\\n" {body} "</function>\\n"'
    for n, (name, schema) in enumerate(tool.properties.items()):
        opening = json.dumps(f"<parameter={name}>\n")
        yield from _parameter_rules(f"{rule}_{n}", opening, tool, name, schema)


def _parameter_rules(rule: str, opening: str, tool: Tool, name: str, schema: Any) -> Iterator[str]:
    if not is_string_type(tool.types_of(name)):
        yield f'{rule}: {opening} {_json(_with_definitions(schema, tool))} "\\n</parameter>\\n"'
        return
    values = _string_values(schema)
    if values:
        yield f'{rule}: {opening} ({" | ".join(map(json.dumps, values))}) "\\n</parameter>\\n"'
        return
    yield f'{rule}: {opening} {rule}_text "\\n"'
    yield f'{rule}_text[suffix="</parameter>"]: /{_string_regex(schema)}/'


def _with_definitions(schema: Any, tool: Tool) -> Any:
    return {**schema, **tool.definitions} if isinstance(schema, dict) else schema


def _string_values(schema: Any) -> list[str]:
    if not isinstance(schema, Mapping):
        return []
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _string_regex(schema: Any) -> str:
    limits = [schema.get(key) for key in ("minLength", "maxLength")] if isinstance(schema, Mapping) else []
    shortest, longest = (limit if isinstance(limit, int) and limit >= 0 else None for limit in limits or (None, None))
    if longest is None or longest > MAX_COUNTED_CHARS:
        return TEXT
    return rf"(?s:.{{{min(shortest or 0, longest)},{longest}}})\n"
