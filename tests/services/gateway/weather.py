"""`WEATHER`, `NOW` and `ANY` are tools for tests, and `CALL` and `CALL_NOW` are calls as a model writes them."""

from __future__ import annotations

from typing import Any

from services.gateway.chat.tools import Tool

WEATHER = Tool(
    "get_weather",
    "Tells the weather.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "hours": {"type": "array", "items": {"$ref": "#/$defs/hour"}},
            "note": {"type": "string", "maxLength": 5},
        },
        "required": ["city"],
        "$defs": {"hour": {"type": "number"}},
    },
    is_strict=True,
)
NOW = Tool("now")
ANY = Tool("log", parameters={"type": "object"})

CALL = """<tool_call>
<function=get_weather>
<parameter=city>
Paris <b> / "q" \\ é
x
</parameter>
<parameter=days>
3
</parameter>
<parameter=unit>
F
</parameter>
<parameter=hours>
[1, 2.5]
</parameter>
<parameter=note>
ab
</parameter>
</function>
</tool_call>"""
ARGUMENTS: dict[str, Any] = {"city": 'Paris <b> / "q" \\ é\nx', "days": 3, "unit": "F", "hours": [1, 2.5], "note": "ab"}
CALL_NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
CALL_ANY = "<tool_call>\n<function=log>\n<parameter=a b>\nx</para\n</parameter>\n</function>\n</tool_call>"
