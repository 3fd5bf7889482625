"""The tests check that the text of a chat template decides its dialect."""

from __future__ import annotations

import pytest

from services.gateway.chat.dialects.callless_dialect import CalllessDialect
from services.gateway.chat.dialects.deepseek_v3_dialect import DeepSeekV3Dialect
from services.gateway.chat.dialects.deepseek_v31_dialect import DeepSeekV31Dialect
from services.gateway.chat.dialects.hermes_dialect import HermesDialect
from services.gateway.chat.dialects.selection import dialect_of
from services.gateway.chat.dialects.xml_dialect import XmlDialect
from services.gateway.chat.markers import Marker
from tests.services.gateway.chat_formats import FORMATS


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nemotron", XmlDialect),
        ("qwen3-coder", XmlDialect),
        ("qwen3-next", HermesDialect),
        ("deepseek-v3", DeepSeekV3Dialect),
        ("deepseek-v31", DeepSeekV31Dialect),
    ],
)
def test_the_templates_of_all_formats(name: str, kind: type) -> None:
    template = FORMATS[name].template.read_text()
    dialect = dialect_of(template, lambda text: Marker(text, len(text)))
    assert type(dialect) is kind
    assert all(marker.token_id == len(marker.text) for marker in (dialect.think_end, *dialect.call_markers))


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ messages[0].content }}",
        '<tool_call>\n{"name": {{ call.name }} }\n</tool_call>',
        "[TOOL_CALLS]{{ calls }}",
    ],
)
def test_other_templates_have_no_calls(template: str) -> None:
    assert type(dialect_of(template, lambda text: Marker(text, None))) is CalllessDialect
