from __future__ import annotations

import json

import pytest

from services.gateway.chat.answer_parser import AnswerParser
from services.gateway.chat.dialects.deepseek_v3_dialect import DeepSeekV3Dialect
from services.gateway.chat.dialects.deepseek_v31_dialect import DeepSeekV31Dialect
from services.gateway.chat.dialects.hermes_dialect import HermesDialect
from services.gateway.chat.dialects.json_dialect import JsonDialect
from services.gateway.chat.markers import Marker
from tests.services.gateway.weather import ANY, NOW

KINDS = (DeepSeekV3Dialect, DeepSeekV31Dialect, HermesDialect)
FENCED, UNFENCED, HERMES = (kind(lambda text: Marker(text, None)) for kind in KINDS)
BEGIN, END, CALL, CALL_END = (f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end"))
SEP = "<｜tool▁sep｜>"


def written(dialect: JsonDialect, name: str, arguments: str) -> str:
    """Return a section with one call as the model of a dialect writes the call."""
    if dialect is HERMES:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    fenced = f"function{SEP}{name}\n```json\n{arguments}\n```"
    call = fenced if dialect is FENCED else f"{name}{SEP}{arguments}"
    return f"{BEGIN}{CALL}{call}{CALL_END}{END}"


def parse(dialect: JsonDialect, text: str, is_forced: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Return the content and the calls of an answer, which must not depend on how the text is cut."""
    found = []
    for pieces in ([text], list(text)):
        parser = AnswerParser(dialect, False, (NOW, ANY), is_forced)
        parts = [*map(parser.push, pieces), parser.finish()]
        deltas = [delta for part in parts for delta in part.calls]
        names = [delta.name for delta in deltas if delta.id]
        arguments = ["".join(one.arguments for one in deltas if one.index == n) for n in range(len(names))]
        found.append(("".join(part.content for part in parts), list(zip(names, arguments, strict=True))))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (FENCED, f'{BEGIN}{CALL}function{SEP}log\n```json\n{{"a": 1}}\n```{CALL_END}{END}'),
        (FENCED, f'{BEGIN}\n{CALL}function{SEP}log\n```json\n{{"a": 1}}```\n{CALL_END}\n{END}'),
        (
            FENCED,
            f'{BEGIN}{CALL} function {SEP} log \n```json {{"a": 1}} ```{CALL_END}',
        ),  # the end of the section is missing
        (UNFENCED, f'{BEGIN}{CALL}log{SEP}{{"a": 1}}{CALL_END}{END}'),
        (UNFENCED, f'{BEGIN} {CALL}log {SEP}\n{{"a": 1}}\n{CALL_END}\n{END}\n'),
        (HERMES, '<tool_call>\n{"name": "log", "arguments": {"a": 1}}\n</tool_call>'),
        (HERMES, '<tool_call>{"name":"log","arguments":{"a": 1}}</tool_call>\n'),
        (HERMES, '<tool_call>\n\n {\n  "name" : "log" ,\n  "arguments" :\n{"a": 1}\n}\n\n</tool_call>'),
    ],
)
@pytest.mark.parametrize("is_forced", [False, True])
def test_white_space_around_the_parts_of_a_call(dialect: JsonDialect, text: str, is_forced: bool) -> None:
    assert parse(dialect, text, is_forced) == ("", [("log", '{"a": 1}')])


def test_the_arguments_may_stand_before_the_name() -> None:
    call = '<tool_call>\n{"arguments": {"a": {"name": "x"}}, "name": "log"}\n</tool_call>'
    assert parse(HERMES, f"{call}\n{call}") == ("", [("log", '{"a": {"name": "x"}}')] * 2)
    for broken in (call.replace("log", "unknown"), call.replace('"name": "log"', '"id": 3'), call[:-3]):
        assert parse(HERMES, broken) == (broken, [])


@pytest.mark.parametrize("value", ["```", "\n```", CALL_END, END, f"{CALL_END}{END}", '"}', "\\", "é", "</think>"])
@pytest.mark.parametrize("dialect", [FENCED, UNFENCED, HERMES])
def test_strings_may_hold_markers(dialect: JsonDialect, value: str) -> None:
    arguments = json.dumps({"x": value}, ensure_ascii=False)
    for is_forced in (False, True):
        assert parse(dialect, written(dialect, "log", arguments), is_forced) == ("", [("log", arguments)])


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (FENCED, f"{BEGIN}{CALL}function{SEP}log\n{{}}{CALL_END}{END}"),  # no fence
        (FENCED, f"{BEGIN}{CALL}tool{SEP}log\n```json\n{{}}\n```{CALL_END}{END}"),  # another type
        (FENCED, f"{BEGIN}{CALL}function{SEP}log\n```json\n{{}}\n``{CALL_END}{END}"),
        (FENCED, f"{BEGIN}function{SEP}log\n```json\n{{}}\n```{CALL_END}{END}"),
        (UNFENCED, f"{BEGIN}{CALL}log{SEP}[]{CALL_END}{END}"),  # no object
        (UNFENCED, f'{BEGIN}{CALL}log{SEP}{{"a": NaN}}{CALL_END}{END}'),
        (UNFENCED, f'{BEGIN}{CALL}log{SEP}{{"a": 1]{CALL_END}{END}'),
        (UNFENCED, f"{BEGIN}{CALL}log{SEP}{{}} and{CALL_END}{END}"),
        (UNFENCED, f"{BEGIN}{CALL}unknown{SEP}{{}}{CALL_END}{END}"),
        (UNFENCED, f"{BEGIN}{BEGIN}"),
        (UNFENCED, f"{BEGIN}{CALL}log{SEP}{{"),
        (HERMES, '<tool_call>\n{"name": "log", "arguments": [1]}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "log", "arguments": {}, "id": 3}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "log"}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "log", "arguments": {}}\n}</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "log", "arguments": {\'a\': 1}}\n</tool_call>'),
        (HERMES, "<tool_call>\n<function=log>\n</function>\n</tool_call>"),
        (HERMES, "<tool_call>" * 5),
    ],
)
def test_what_is_no_call_is_content_and_nothing_is_lost(dialect: JsonDialect, text: str) -> None:
    assert parse(dialect, f"a {text}") == (f"a {text}", [])


def test_calls_before_a_broken_call_are_kept() -> None:
    good, broken = f"{CALL}now{SEP}{{}}{CALL_END}", f"{CALL}log{SEP}[{CALL_END}{END}"
    assert parse(UNFENCED, f"{BEGIN}{good}{broken} b") == (f"{broken} b", [("now", "{}")])
    again = f"{BEGIN}{good}{END}"
    assert parse(UNFENCED, f"{BEGIN}{good}{broken}{again}") == (broken, [("now", "{}"), ("now", "{}")])


def test_a_forced_call_that_is_cut_off_shows_what_there_is() -> None:
    text = f'{BEGIN}{CALL}log{SEP}{{"a": "Par'
    assert parse(UNFENCED, text, is_forced=True) == ("", [("log", '{"a": "Par')])
    parser = AnswerParser(UNFENCED, False, (ANY,), is_forced=True)
    assert [delta.name for delta in parser.push(text[: -len('{"a": "Par')]).calls] == ["log"]
    assert [delta.arguments for delta in parser.push('{"a": "Par').calls] == ['{"a": "Par']


def test_a_forced_call_may_be_nested_deep() -> None:
    arguments = f'{{"a": {"[" * 300}{"]" * 300}}}'
    for dialect in (FENCED, UNFENCED, HERMES):
        text = written(dialect, "log", arguments)
        assert parse(dialect, text, is_forced=True) == ("", [("log", arguments)])
        assert parse(dialect, text) == (text, [])


@pytest.mark.parametrize("dialect", [FENCED, HERMES])
def test_white_space_before_the_reasoning_is_read_once(dialect: JsonDialect) -> None:
    for after, content, reasoning in [("<think>so", "", "so"), ("<thin", " " * 3000 + "<thin", "")]:
        parser = AnswerParser(dialect, False, opens_reasoning=True)
        parts = []
        for char in " " * 3000 + after:
            parts.append(parser.push(char))
            assert len(parser._beginning or "") < len("<think>")
        parts.append(parser.finish())
        assert "".join(part.content for part in parts) == content
        assert "".join(part.reasoning for part in parts) == reasoning
