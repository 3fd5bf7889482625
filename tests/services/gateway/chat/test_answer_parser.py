"""The tests check that an `AnswerParser` gives the same parts for every way of cutting the text into pieces."""

from __future__ import annotations

import json
import random
import time
from itertools import pairwise
from typing import Any

import pytest

from services.gateway.chat.answer_parser import MAX_BROKEN_CALLS, AnswerParser, AnswerParts
from services.gateway.chat.dialects.xml_dialect import XmlDialect
from services.gateway.chat.markers import Marker
from tests.services.gateway.weather import ANY, ARGUMENTS, CALL, CALL_NOW, NOW, WEATHER

TOOLS = (WEATHER, NOW, ANY)
XML = XmlDialect(lambda text: Marker(text, None))
Parsed = tuple[str, str, list[tuple[str, str]]]


def parse(pieces: list[str], **kind: Any) -> Parsed:
    """Parse the text `pieces`; return the content, the reasoning, and the pair (name, arguments) of each call."""
    parser = AnswerParser(XML, **kind)
    parts: list[AnswerParts] = [*(parser.push(piece) for piece in pieces), parser.finish()]
    calls: dict[int, tuple[str, str]] = {}
    for delta in (delta for part in parts for delta in part.calls):
        assert delta.id or delta.arguments, "no piece is empty"
        name, arguments = calls.get(delta.index, ("", ""))
        assert bool(delta.id) == bool(delta.name) == (delta.index not in calls), "the first piece names the call"
        calls[delta.index] = (name + delta.name, arguments + delta.arguments)
    return (
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        [calls[index] for index in range(len(calls))],
    )


def parse_cut(text: str, **kind: Any) -> Parsed:
    """Return the parts of `text`, and check that the parts do not depend on how the text is cut.

    The text is parsed in one piece, character by character, and cut at random positions.
    """
    rng = random.Random(len(text))
    whole = parse([text], **kind)
    assert parse(list(text), **kind) == whole
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(1, 12)))
        assert parse([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], **kind) == whole
    return whole


@pytest.mark.parametrize("is_forced", [False, True])
def test_reasoning_content_and_calls(is_forced: bool) -> None:
    text = f"Hm.\n\n</think>\n\nLook:\n{CALL}\n{CALL_NOW}\n"
    content, reasoning, calls = parse_cut(text, in_reasoning=True, tools=TOOLS, is_forced=is_forced)
    assert (content, reasoning) == ("Look:", "Hm.")
    assert [name for name, _ in calls] == ["get_weather", "now"]
    assert [json.loads(arguments) for _, arguments in calls] == [ARGUMENTS, {}]


@pytest.mark.parametrize(
    ("text", "reasons", "has_tools", "content", "reasoning"),
    [
        ("\nplain\n\n", False, False, "\nplain\n\n", ""),
        ("a\n\nb\n", False, True, "a\n\nb\n", ""),
        ("never ends\n", True, True, "", "never ends\n"),
        ("</think>\n\nyes\n", True, False, "yes\n", ""),
        ("so\n</think>", True, False, "", "so"),
        ("a </thin b </think> c </think> d", True, False, " c </think> d", "a </thin b "),
        (CALL_NOW, False, False, CALL_NOW, ""),
    ],
)
def test_texts_without_calls(text: str, reasons: bool, has_tools: bool, content: str, reasoning: str) -> None:
    tools = TOOLS if has_tools else ()
    assert parse_cut(text, in_reasoning=reasons, tools=tools) == (content, reasoning, [])


@pytest.mark.parametrize(
    "text",
    [
        "a <tool_call> b <tool_call>\n<function=no>\n</function>\n</tool_call>\n\n",  # there is no function "no"
        "a\n" + CALL[:-3],  # the end of the call is cut off
        CALL.replace("</function>", "oops</function>"),
        CALL.replace("<function=get_weather>", "<function=get_weather"),
        "<tool_call>{}</tool_call>",
        "<tool_call",
        "x <tool_call>\n<function=now></function></tool_call".replace("now", "NOW"),
    ],
)
def test_what_is_no_call_is_content_and_nothing_is_lost(text: str) -> None:
    assert parse_cut(text, in_reasoning=False, tools=TOOLS) == (text, "", [])


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"Hm.\n{CALL_NOW}\n</think>\n\nDone.", "Done."),
        (f"Hm.\n\n{CALL_NOW}", ""),
        (f"Hm.{CALL_NOW}\nSo.</think>", "So."),
        (f"Hm.\n{CALL_NOW}\n{CALL_NOW}\n", ""),
    ],
)
def test_a_call_ends_the_reasoning(text: str, content: str, is_forced: bool) -> None:
    found, reasoning, calls = parse_cut(text, in_reasoning=True, tools=TOOLS, is_forced=is_forced)
    assert (found, reasoning) == (content, "Hm.")
    assert calls == [("now", "{}")] * text.count("<tool_call>")


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("I could write <tool_call> here.\n</think>\n\nNo.", "No.", "I could write <tool_call> here."),
        ("Hm <tool_call>\n<function=no>\n</think>x", "x", "Hm <tool_call>\n<function=no>"),
        (f"Hm\n{CALL_NOW[:-3]}", "", f"Hm\n{CALL_NOW[:-3]}"),
        ("Hm <tool_call></think>", "", "Hm <tool_call>"),
    ],
)
def test_what_is_no_call_stays_reasoning(text: str, content: str, reasoning: str) -> None:
    assert parse_cut(text, in_reasoning=True, tools=TOOLS) == (content, reasoning, [])
    after = f"{text.partition('</think>')[0]}{CALL_NOW}"
    _, before, calls = parse_cut(after, in_reasoning=True, tools=TOOLS)
    assert (before, calls) == (reasoning, [("now", "{}")])


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('\n["a</parameter>b", "\\"</parameter>"]\n', ["a</parameter>b", '"</parameter>']),
        ('["a"]', ["a"]),
        ("\n['it\"s']\n", "['it\"s']"),  # no JSON: the value is the text
        ("\n</parameter", "</parameter"),
    ],
)
def test_a_json_value_ends_outside_of_its_strings(written: str, value: Any, is_forced: bool) -> None:
    before, after = "<tool_call><function=get_weather><parameter=hours>", "</parameter></function></tool_call>"
    _, _, calls = parse_cut(before + written + after, in_reasoning=False, tools=TOOLS, is_forced=is_forced)
    [(_, arguments)] = calls
    assert json.loads(arguments) == {"hours": value}


def test_a_call_after_a_broken_one() -> None:
    after = parse_cut("<tool_call>" + CALL_NOW, in_reasoning=False, tools=TOOLS)
    assert after == (
        "<tool_call>",
        "",
        [("now", "{}")],
    )
    content, _, calls = parse_cut(f"{CALL_NOW}\ntail\n", in_reasoning=False, tools=TOOLS)
    assert (content, calls) == ("tail\n", [("now", "{}")])


def test_after_many_broken_calls_no_further_call_begins() -> None:
    begun = "<tool_call>\n<function=log>\n<parameter=a>\n"
    few, many = (begun * num + "\n</parameter>\nno call\n" for num in (MAX_BROKEN_CALLS - 1, MAX_BROKEN_CALLS))
    for broken, has_call in ((few, True), (many, False)):
        content, _, calls = parse_cut(broken + CALL_NOW, in_reasoning=False, tools=TOOLS)
        assert bool(calls) == has_call
        assert content == broken.strip("\n") + ("" if has_call else f"\n{CALL_NOW}")


def test_a_forced_call_that_is_cut_off_shows_what_there_is() -> None:
    _, _, calls = parse_cut(CALL[: CALL.index(" <b>")], in_reasoning=False, tools=TOOLS, is_forced=True)
    assert calls == [("get_weather", '{"city": "Paris')]


def test_a_forced_call_is_shown_as_it_comes_and_a_free_one_when_it_is_whole() -> None:
    forced, free = AnswerParser(XML, False, TOOLS, is_forced=True), AnswerParser(XML, False, TOOLS)
    assert [delta.name for delta in forced.push(CALL[:40]).calls] == ["get_weather"]
    assert free.push(CALL[:-1]).calls == ()
    assert free.push(CALL[-1:]).calls[0].name == "get_weather"


def test_after_the_last_allowed_call_nothing_is_read() -> None:
    parser = AnswerParser(XML, False, TOOLS, max_calls=1)
    assert len(parser.push(f"{CALL_NOW}\n{CALL_NOW} tail").calls) == 1
    assert parser.is_done
    assert parser.finish() == AnswerParts()


def test_splitting_is_linear() -> None:
    value = "x" * 400_000
    text = f"{value}</think><tool_call><function=get_weather><parameter=city>{value}</parameter></function></tool_call>"
    parser = AnswerParser(XML, True, TOOLS)
    start = time.thread_time()
    parts = [parser.push(text[i : i + 4]) for i in range(0, len(text), 4)]
    assert time.thread_time() - start < 10
    assert len(parts[-1].calls[0].arguments) > len(value)
