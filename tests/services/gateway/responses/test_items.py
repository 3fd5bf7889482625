from __future__ import annotations

from typing import Any

import pytest

from services.gateway.chat.conversation import ChatMessage
from services.gateway.responses.items import Item, encode_reasoning, parse_items, to_messages


def messages(items: Any, instructions: str | None = None) -> list[ChatMessage]:
    return list(to_messages(parse_items(items, no_item), instructions))


def no_item(item_id: str) -> Item:
    raise AssertionError(item_id)


def say(role: str, text: str) -> Item:
    return {"role": role, "content": text}


def think(text: str) -> Item:
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def call(call_id: str) -> Item:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def output(call_id: str) -> Item:
    return {"type": "function_call_output", "call_id": call_id, "output": [{"type": "input_text", "text": "done"}]}


def test_one_turn_of_the_assistant_is_one_message() -> None:
    turns = messages([say("user", "hi"), think("so"), say("assistant", "I call."), call("a"), call("b"), output("a")])
    assert [turn.role for turn in turns] == ["user", "assistant", "tool"]
    answer = turns[1]
    assert (answer.content, answer.reasoning, [past.id for past in answer.tool_calls]) == ("I call.", "so", ["a", "b"])
    assert (turns[2].content, turns[2].tool_call_id) == ("done", "a")


@pytest.mark.parametrize(
    "items",
    [
        [say("assistant", "one"), say("assistant", "two")],
        [call("a"), say("assistant", "two")],
        [call("a"), think("two")],
        [say("assistant", "one"), think("two")],
        [think("one"), say("user", "two")],
    ],
)
def test_turns_that_stay_apart(items: list[Item]) -> None:
    assert len(messages(items)) == 2


def test_instructions_come_first() -> None:
    assert messages("hi", "be brief") == [ChatMessage("system", "be brief"), ChatMessage("user", "hi")]
    # Some chat templates allow only one system message.
    turns = messages([say("developer", "and kind"), say("user", "hi")], "be brief")
    assert turns == [ChatMessage("system", "be brief\n\nand kind"), ChatMessage("user", "hi")]


def test_reasoning_in_every_form() -> None:
    encrypted = {"type": "reasoning", "summary": [], "encrypted_content": encode_reasoning("naïve 🦜")}
    assert messages([encrypted])[0].reasoning == "naïve 🦜"
    for foreign in ("gAAAAABo", "expertmesh:%", "expertmesh:/w==", None, 5):
        assert messages([encrypted | {"encrypted_content": foreign}]) == []
    assert messages([encrypted | think("shown")])[0].reasoning == "shown"


def test_items_keep_only_what_has_an_effect() -> None:
    part = {"type": "refusal", "refusal": "no", "x": "y" * 100}
    (item,) = parse_items([{"role": "assistant", "content": [part], "id": "m", "x": 1}], no_item)
    parts = [{"type": "output_text", "text": "no", "annotations": []}]
    assert item == {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": parts}


def test_references_name_stored_items() -> None:
    stored = parse_items("stored", no_item)[0] | {"id": "msg_1"}
    for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}, {"id": "msg_1", "type": None}):
        assert parse_items([reference], {"msg_1": stored}.__getitem__) == [stored]
