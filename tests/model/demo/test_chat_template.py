"""The tests check how the demo's chat template renders conversations, tools with their results, and reasoning."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from model.demo import DEMO

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "x"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def render(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_a_plain_conversation(tokenizer: Any) -> None:
    messages = [turn("system", "s"), turn("user", "u"), turn("assistant", "a"), turn("user", "v")]
    assert render(tokenizer, messages) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>a<|im_end|>\n<|im_start|>user\nv<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>"
    )
    assert render(tokenizer, messages[:2], enable_thinking=True).endswith("<|im_start|>assistant\n<think>\n")


def test_tools_their_calls_and_their_results(tokenizer: Any) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    text = render(tokenizer, [turn("system", "s"), turn("user", "u"), called, turn("tool", "3")], tools=[TOOL])
    assert text.startswith("<|im_start|>system\ns\n\nYou may call these functions:\n<tools>\n{")
    assert text.count("<|im_start|>system") == 1
    assert '"name": "add"' in text
    assert text.endswith(
        "<|im_start|>assistant\n<think></think><tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n"
        "<parameter=b>\nx\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think></think>"
    )


def test_calls_side_by_side_and_what_was_said_before_them(tokenizer: Any) -> None:
    called = {"role": "assistant", "content": "so", "tool_calls": [CALL, CALL]}
    text = render(tokenizer, [turn("user", "u"), called, turn("tool", "3"), turn("tool", "4")], tools=[TOOL])
    assert "<think></think>so\n<tool_call>\n" in text
    assert text.count("</tool_call>\n<tool_call>\n") == 1
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think></think>"
    )


def test_history_loses_its_reasoning_unless_asked_not_to(tokenizer: Any) -> None:
    thought = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    messages = [turn("user", "u"), thought, turn("user", "v")]
    assert "because" not in render(tokenizer, messages)
    assert "<think>\nbecause</think>a" in render(tokenizer, messages, truncate_history_thinking=False)
    assert "<think>\nbecause</think>a" in render(
        tokenizer, messages[:2]
    )  # the turn that the model continues keeps the reasoning
    written = turn("assistant", "<think>\nbecause\n</think>\n\na")
    assert "<think></think>a<|im_end|>" in render(tokenizer, [messages[0], written, messages[2]])
    about_tags = turn("assistant", "b </think> c")
    assert "<think></think>b </think> c<|im_end|>" in render(tokenizer, [messages[0], about_tags, messages[2]])
