from __future__ import annotations

import pytest

from services.gateway.chat.conversation import PastCall
from services.gateway.chat.dialects.xml_dialect import XmlDialect
from services.gateway.chat.markers import Marker
from services.gateway.chat.tools import Tool, ToolUse

DIALECT = XmlDialect(lambda text: Marker(text, None))


@pytest.mark.parametrize("name", ["a>b", "a<b", "a\nb"])
def test_names_that_xml_cannot_hold(name: str) -> None:
    tools = (Tool("f"), Tool("g", parameters={"properties": {name: {}}}))
    sentence = r"^tools\[1\]\.function\.parameters\.properties must hold names without '<', '>' and line ends"
    with pytest.raises(ValueError, match=sentence):
        DIALECT.usable(ToolUse(tools))
    assert DIALECT.usable(ToolUse(tools[:1])) == ToolUse(tools[:1])


def test_which_prompts_show_a_call() -> None:
    call = PastCall("1", "f", '{"k": "a value"}')
    shown = "<tool_call>\n<function=f>\n<parameter=k>\na value\n</parameter>\n</function>\n</tool_call>"
    assert DIALECT.shows_call(f"a {shown}", call)
    for text in ("", shown.replace("=f>", "=g>"), shown.replace("a value", "a"), "<function=f>\n{'k': 'a value'}"):
        assert not DIALECT.shows_call(f"a {text}", call)
