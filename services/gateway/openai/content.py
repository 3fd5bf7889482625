"""The content of a message is a string or a list of parts; `text_of` and `thinking_of` join the texts of the parts.

The types of text parts are those of OpenAI's chat completions (`text`, `refusal`) and Responses API (`input_text`,
`output_text`). A `thinking` part, as in the APIs of vLLM and Anthropic, holds earlier reasoning. Fields of a part that
are not read here, such as `cache_control`, have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
THINKING_KEYS = {"thinking": "thinking"}
WITHOUT_TEXT = ("redacted_thinking",)  # parts that hold nothing for the model


def _check_content(value: object) -> object:
    """Return `value` if it is a string, null or a list of parts. Raises ValueError for every other value."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError('must be a string or a list of {"type": "text", "text": "..."} parts')
    for index, part in enumerate(value):
        if isinstance(part, dict):
            _check_part(index, part)
        elif not isinstance(part, str):
            raise ValueError(f'must hold {{"type": "text", "text": "..."}} parts, but part {index} is no JSON object')
    return value


def _check_part(index: int, part: dict[str, Any]) -> None:
    type_ = part.get("type")
    if not isinstance(type_, str):
        raise ValueError(f"must hold parts with a type, but part {index} has none")
    key = TEXT_KEYS.get(type_) or THINKING_KEYS.get(type_)
    if key is None and type_ not in WITHOUT_TEXT:
        raise ValueError(
            f"must hold only parts of type 'text', because the model reads only text, but part {index} is of type "
            f"{type_[:40]!r}"
        )
    if key is not None and not isinstance(part.get(key), str):
        raise ValueError(f"must hold a string {key!r} in each part of type {type_!r}, but part {index} holds none")


CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type"],
                "properties": {
                    "type": {"enum": [*TEXT_KEYS, *THINKING_KEYS, *WITHOUT_TEXT]},
                    **{key: {"type": "string"} for key in (*TEXT_KEYS.values(), *THINKING_KEYS.values())},
                },
            },
        },
        {"type": "null"},
    ]
}
Content = Annotated[Any, AfterValidator(_check_content), WithJsonSchema(CONTENT_SCHEMA)]


def text_of(content: str | list[Any] | None) -> str | None:
    """Return the text of a message's content without its thinking, or None if there is no content."""
    return _joined(content, TEXT_KEYS) if isinstance(content, list) else content


def thinking_of(content: str | list[Any] | None) -> str:
    """Return the text of the thinking parts of a message's content."""
    return _joined(content, THINKING_KEYS) if isinstance(content, list) else ""


def _joined(parts: list[Any], keys: dict[str, str]) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts += [part] if keys is TEXT_KEYS else []
        elif (key := keys.get(part["type"])) is not None:
            texts.append(part[key])
    return "".join(texts)
