"""`compose` makes one grammar for a whole answer: its reasoning, its response format and its tool calls.

The grammars are in llguidance's dialect of Lark (see docs/syntax.md in llguidance's repository). Special tokens have no
text in llguidance's dialect, and a grammar refers to special tokens by their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.gateway.chat.dialects.call_rules import json_rule, spelled
from services.gateway.chat.dialects.dialect import Dialect
from services.gateway.chat.markers import Marker
from services.gateway.chat.tools import ToolUse
from services.gateway.schema.budget import SchemaBudget
from services.gateway.schema.counted_chars import CountedChars
from services.gateway.schema.errors import UnsupportedKeyword
from services.gateway.schema.json_schema import SchemaRewriter
from services.gateway.schema.json_text import loads
from services.gateway.schema.raw_text import ANY_TEXT, MarkerInValue
from services.gateway.schema.references import SchemaRoot
from services.gateway.schema.regex import literal

# A function that raises ValueError if a grammar cannot be used; see
# `services.engine.grammar.grammar_checker.GrammarChecker.check`.
CheckGrammar = Callable[[Grammar], None]


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


@dataclass(frozen=True)
class GrammarBuilder:
    """A `GrammarBuilder` makes the grammar of a request's answer; `build` takes long for large schemas."""

    dialect: Dialect
    budget: SchemaBudget
    check_grammar: CheckGrammar | None

    def build(self, answer: Grammar | None, param: str, tool_use: ToolUse, in_reasoning: bool) -> Grammar | None:
        """Return the checked grammar of the whole answer, or None if the answer may be any text.

        `answer` is the grammar of the text behind the reasoning, from the client's parameter `param`; None: the client
        gave no grammar. Raises ValueError whose message begins with the name of a parameter.

        If the schemas of tools that are not strict cannot be used, only the types of their arguments are enforced.
        """
        if answer is None and not tool_use.is_enforced:
            return None
        tools = [(f"tools[{n}].function.parameters", tool.parameters) for n, tool in enumerate(tool_use.tools)]
        self.budget.check(tools if tool_use.callable_tools else [])
        if answer is not None:
            answer = self._checked(self._readable(answer, param), param)
        try:
            return self._composed(answer, tool_use, in_reasoning, is_relaxed=False)
        except MarkerInValue:
            raise
        except ValueError:
            if all(tool.is_strict for tool in tool_use.callable_tools):
                raise
            return self._composed(answer, tool_use, in_reasoning, is_relaxed=True)

    def _composed(
        self, answer: Grammar | None, tool_use: ToolUse, in_reasoning: bool, is_relaxed: bool
    ) -> Grammar | None:
        composed = compose(answer, tool_use, in_reasoning, self.dialect, is_relaxed)
        if composed is None or composed is answer:
            return composed
        return self._checked(composed, "tools" if tool_use.tools else "the answer's form")

    def _checked(self, grammar: Grammar, param: str) -> Grammar:
        if self.check_grammar is not None:
            check(grammar, param, self.check_grammar)
        return grammar

    def _readable(self, grammar: Grammar, param: str) -> Grammar:
        """Return `grammar`; a JSON schema is rewritten to the keywords that the engine's grammars know."""
        if grammar.kind is not GrammarKind.JSON_SCHEMA:
            return grammar
        try:
            schema = loads(grammar.text)
        except ValueError as error:
            raise ValueError(f"{param} must hold a JSON schema in JSON: {error}.") from error
        if not isinstance(schema, dict):
            raise ValueError(f"{param} must hold a JSON schema that is an object, not {type(schema).__name__}.")
        self.budget.check([(param, schema)])
        counted = CountedChars()
        try:
            rewritten = SchemaRewriter(SchemaRoot(schema), is_strict=True, counted=counted).rewrite(schema, "")
        except UnsupportedKeyword as error:
            raise ValueError(f"{param} cannot be used: {error}") from error
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(rewritten), counted.num)


def compose(
    answer: Grammar | None, tool_use: ToolUse, in_reasoning: bool, dialect: Dialect, is_relaxed: bool = False
) -> Grammar | None:
    """Return one grammar for the whole answer, or None if the answer may be any text.

    - `answer`: the grammar of the text after the reasoning; None if the client gave no grammar.
    - `tool_use`: the tools. If calls are forced, calls must match the tools' schemas. If the model may choose between
      text and calls, the grammar makes calls match the schemas only if at least one tool is strict, or if the client
      named the tools that may be called.
    - `in_reasoning`: True if the answer begins with reasoning, which ends at `</think>`, or at a tool call.
    - `dialect`: the format of the answer, with the markers of the model's tokenizer.
    - `is_relaxed`: if True, the grammar enforces only the types of the arguments of tools that are not strict.

    Raises ValueError if the schemas of the tools cannot be expressed; see `CallRules`.
    """
    tools = tool_use.callable_tools
    if answer is None and not tool_use.is_enforced:
        return None
    if answer is not None and not tools and not in_reasoning:
        return answer
    counted = CountedChars(answer.num_counted if answer is not None else 0)
    calls = dialect.call_rules(tool_use, counted, is_relaxed) if tools else None
    rules, rest = (calls.rules, calls.more) if calls else ([], None)
    if answer is not None:
        rules.append(f"answer: {_expression(answer)}")
        start = "answer | calls" if tools else "answer"
    elif tool_use.is_forced:
        start = "calls"
    else:
        rules += _free_rules(dialect.calls_start, tool_use)
        start, rest = "free", "" if tool_use.max_calls == 1 else "free"
    rules += _reasoning_rules(dialect, start, rest) if in_reasoning else [f"start: {start}"]
    return Grammar(GrammarKind.LARK, "\n".join(rules) + "\n", counted.num)


def _expression(grammar: Grammar) -> str:
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return json_rule({"type": "object"})
        case GrammarKind.JSON_SCHEMA:
            return json_rule(loads(grammar.text))
        case GrammarKind.REGEX:
            return _regex(grammar.text)
    return f"%lark {{\n{grammar.text}\n}}"


def _regex(pattern: str) -> str:
    """Return the regular expression `pattern` between slashes, with every slash inside the pattern escaped."""
    escaped = re.sub(r"\\.|/", lambda found: found[0] if found[0] != "/" else r"\/", pattern, flags=re.DOTALL)
    return f"/{escaped}/"


def _ending_with(marker: Marker, ends: Sequence[Marker]) -> str:
    """Return a terminal's expression for text that ends with `marker`, and contains none of `ends` before `marker`."""
    not_before = "|".join(literal(end.text) for end in ends)
    return f"({ANY_TEXT} {json.dumps(marker.text)}) & ~/(?s:.*)({not_before})(?s:.+)/"


def _reasoning_rules(dialect: Dialect, start: str, rest: str | None) -> list[str]:
    """Return the rules for reasoning, which ends at the marker of its end or, if `rest` is a string, at a tool call.

    - `start`: the expression for all that may follow the reasoning and its end marker.
    - `rest`: the expression for all that may follow a tool call that ends the reasoning; None: there are no tools.
    """
    think_end = dialect.think_end
    used = [think_end] if rest is None else [think_end, dialect.calls_start]
    texts = [marker for marker in used if marker.token_id is None]
    rules, ends = [r"GAP: /\n{0,2}/"], [f"think_end GAP ({start})"]
    if think_end.token_id is None:
        rules += ["think_end: THINK_END", f"THINK_END: {_ending_with(think_end, texts)}"]
    else:
        rules.append(f"think_end: think {spelled(think_end)}")
    for call_start in used[1:]:
        ends.append(f"think_call call_rest {rest}")
        if call_start.token_id is None:
            rules += ["think_call: THINK_CALL", f"THINK_CALL: {_ending_with(call_start, texts)}"]
        else:
            rules.append(f"think_call: think {spelled(call_start)}")
    if len(texts) < len(used):
        rules.append(f"think: {ANY_TEXT}")
    return [f"start: {' | '.join(ends)}", *rules]


def _free_rules(marker: Marker, tool_use: ToolUse) -> list[str]:
    """Return the rules for text in which `marker` begins a valid call."""
    more = "?" if tool_use.max_calls == 1 else "*"
    if marker.token_id is not None:
        return [f"free: TEXT (call TEXT){more}", f"TEXT: {ANY_TEXT}"]
    without = f"TEXT: {ANY_TEXT} & ~/(?s:.*){literal(marker.text)}(?s:.*)/"
    return [f"free: (TEXT_TO_CALL call_rest){more} TEXT", f"TEXT_TO_CALL: {_ending_with(marker, [marker])}", without]
