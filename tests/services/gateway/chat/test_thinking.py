"""The tests check how the parameters of reasoning become a switch for the chat template and a budget of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from services.gateway.chat.thinking import Thinking


@pytest.mark.parametrize(
    ("effort", "is_enabled", "budget", "short_budget"),
    [
        (None, None, None, None),
        ("none", False, None, None),
        ("minimal", False, None, None),
        ("low", True, 512, 50),
        ("medium", True, 2048, 50),
        ("high", True, 8192, 50),
        ("xhigh", True, 32_768, 50),
        ("max", True, None, None),
    ],
)
def test_efforts(effort: str | None, is_enabled: bool | None, budget: int | None, short_budget: int | None) -> None:
    thinking = Thinking(effort)
    given = thinking.template_kwargs({"other": 1})
    assert given.get("enable_thinking") is is_enabled
    assert given.get("reasoning_effort") == effort
    assert given["other"] == 1
    assert (thinking.budget(100_000), thinking.budget(101)) == (budget, short_budget)


def test_a_given_budget_is_used_as_it_is() -> None:
    assert Thinking("low", 3000).budget(1000) == 3000
    assert Thinking(token_budget=0).budget(1000) == 0
    assert Thinking("low", -1).budget(1000) is None


@pytest.mark.parametrize(
    ("given", "kwargs", "message"),
    [
        ({"effort": "much"}, None, "reasoning_effort must be 'none', 'minimal', 'low', 'medium', "),
        ({"token_budget": -2}, None, "thinking_token_budget must be at least 0, or -1 for no limit, not -2."),
        ({"effort": "none", "token_budget": 5}, None, "thinking_token_budget may not be given if reasoning_effort is"),
        ({"enable_thinking": False, "token_budget": 5}, None, "thinking_token_budget may not be given if enable_think"),
        ({"effort": "low", "enable_thinking": False}, None, "reasoning_effort must not be 'low' if enable_thinking is"),
        ({"effort": "none", "enable_thinking": True}, None, "reasoning_effort must not be 'none' if enable_thinking "),
        ({"effort": "none"}, {"enable_thinking": True}, "reasoning_effort must not contradict enable_thinking in chat"),
        ({"token_budget": 5}, {"enable_thinking": False}, "thinking_token_budget may not be given if enable_thinking "),
        (
            {"enable_thinking": True},
            {"thinking": False},
            "enable_thinking must not contradict thinking in chat_tem",
        ),
        (
            {"effort": "low"},
            {"thinking": False},
            "reasoning_effort must not contradict thinking in chat_templat",
        ),
        (
            {"token_budget": 5},
            {"thinking": False},
            "thinking_token_budget may not be given if thinking in chat_",
        ),
        ({}, {"tokenize": True}, "chat_template_kwargs must not hold 'tokenize', which the server itself sets."),
    ],
)
def test_contradictions(given: dict[str, Any], kwargs: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ValueError, match=r".*") as error:
        Thinking(**given).template_kwargs(kwargs)
    assert str(error.value).startswith(message)
