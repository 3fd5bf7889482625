from __future__ import annotations

from dataclasses import replace

import pytest

from services.gateway.chat.dialects.callless_dialect import CalllessDialect
from services.gateway.chat.markers import Marker
from services.gateway.chat.tools import ToolMode, ToolUse
from tests.services.gateway.weather import ANY, NOW, WEATHER

REASON = "because the gateway knows no format for calls in the model's chat template."
DIALECT = CalllessDialect(lambda text: Marker(text, None))


def test_tools_that_the_model_need_not_call_are_left_out() -> None:
    assert DIALECT.usable(ToolUse()).callable_tools == ()
    for use in (ToolUse((NOW, ANY)), ToolUse((WEATHER,), ToolMode.NONE)):
        assert DIALECT.usable(use) == replace(use, mode=ToolMode.NONE)
    assert DIALECT.usable(ToolUse((WEATHER, NOW), ToolMode.NONE, allowed=("now",))).callable_tools == ()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (ToolUse((NOW,), ToolMode.REQUIRED), f"tool_choice may not force a call, {REASON}"),
        (ToolUse((NOW,), function="now"), f"tool_choice may not force a call, {REASON}"),
        (ToolUse((NOW, ANY), allowed=("now",)), f"tool_choice may not name allowed tools, {REASON}"),
        (ToolUse((NOW, WEATHER)), f"tools[1].function.strict may not be true, {REASON}"),
    ],
)
def test_calls_that_must_be_valid_are_refused(use: ToolUse, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        DIALECT.usable(use)
    assert str(refused.value) == message
