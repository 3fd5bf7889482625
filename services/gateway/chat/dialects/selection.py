"""`dialect_of` finds the dialect of a chat template."""

from __future__ import annotations

from services.gateway.chat.dialects.callless_dialect import CalllessDialect
from services.gateway.chat.dialects.deepseek_v3_dialect import DeepSeekV3Dialect
from services.gateway.chat.dialects.deepseek_v31_dialect import DeepSeekV31Dialect
from services.gateway.chat.dialects.dialect import Dialect, FindMarker
from services.gateway.chat.dialects.hermes_dialect import ARGUMENTS_KEY, NAME_KEY, HermesDialect
from services.gateway.chat.dialects.json_call_form import FENCE_END, SEPARATOR
from services.gateway.chat.dialects.xml_call_parser import CALL_START, FUNCTION, PARAMETER
from services.gateway.chat.dialects.xml_dialect import XmlDialect

# dialects, each with the strings that a template of the dialect holds; the first dialect that fits is taken
DIALECTS: tuple[tuple[type[Dialect], tuple[str, ...]], ...] = (
    (DeepSeekV3Dialect, (SEPARATOR, FENCE_END)),
    (DeepSeekV31Dialect, (SEPARATOR,)),
    (XmlDialect, (FUNCTION, PARAMETER)),
    (HermesDialect, (CALL_START, NAME_KEY, ARGUMENTS_KEY)),
    (CalllessDialect, ()),
)


def dialect_of(template: str, find_marker: FindMarker) -> Dialect:
    """Return the dialect of the chat template whose text is `template`.

    The format is found in the template's text, because models of one family have different formats, and models of
    different families have the same format.
    """
    kind = next(kind for kind, texts in DIALECTS if all(text in template for text in texts))
    return kind(find_marker)
