from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.anthropic.message_events import whole_message
from services.gateway.chat.text_delta import TextDelta
from services.gateway.chat.tool_call_delta import ToolCallDelta

DEEP = f'{{"a": {"[" * 300}{"]" * 300}}}'


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [("", {}), ('{"a": 1}', {"a": 1}), ('{"a": 1, "b": [2, "x', {"a": 1, "b": [2]}), (DEEP, {}), (DEEP[:250], {})],
)
def test_the_arguments_of_a_call_are_an_object(arguments: str, shown: dict[str, Any]) -> None:
    delta = TextDelta(0, "", (1,), "length", 1, 1, calls=(ToolCallDelta(0, "call_1", "f", arguments),))
    message = json.loads(whole_message("msg_1", "demo", delta, hides_thinking=False))
    assert [(block["name"], block["input"]) for block in message["content"]] == [("f", shown)]
