from __future__ import annotations

from typing import Any

import pytest

from services.gateway.schema.alternatives import Alternatives
from services.gateway.schema.references import SchemaRoot


def tagged(*values: Any, is_required: bool = True) -> dict[str, Any]:
    needed = {"required": ["tag"]} if is_required else {}
    return {"type": "object", "properties": {"tag": {"enum": list(values)}}, **needed}


DEFINITIONS = {
    "A": tagged("a"),
    "B": {"allOf": [{"$ref": "#/$defs/C"}, {"required": ["tag"]}]},
    "C": tagged("b", "c", is_required=False),
    "Both": {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]},
    "Itself": {"$ref": "#/$defs/Itself"},
    "Colour": {"type": "string", "enum": ["red", "blue"]},
}


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


@pytest.mark.parametrize(
    ("options", "are_exclusive"),
    [
        ([], True),
        ([{"type": "string"}, {"type": ["null", "array"]}, ref("A")], True),
        ([ref("A"), ref("B"), {"type": "null"}], True),
        ([ref("Both"), tagged("d", 1)], True),
        ([ref("Both"), tagged("d", "c")], False),
        ([ref("A"), ref("C")], False),  # an object without a tag matches C, and perhaps also other options
        ([ref("A"), ref("A")], False),
        ([ref("Colour"), {"enum": ["green", 1]}, {"const": None}], True),
        ([ref("Colour"), {"enum": ["green", "red"]}], False),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": 1}, {"const": True}], True),
        ([{"const": [1]}, {"const": [1.0]}], False),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([ref("Itself"), {"type": "null"}], False),
        ([ref("Nothing"), {"type": "null"}], False),
        ([True, {"type": "null"}], False),
        ([{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}], False),
    ],
)
def test_options_that_exclude_one_another(options: list[Any], are_exclusive: bool) -> None:
    assert Alternatives(SchemaRoot({"$defs": DEFINITIONS})).are_exclusive(options) == are_exclusive


def test_a_property_may_tell_options_apart_that_do_not_require_it() -> None:
    alternatives = Alternatives(SchemaRoot({"$defs": DEFINITIONS}))
    assert alternatives.are_told_apart_by("tag", [ref("A"), ref("C")])
    assert not alternatives.are_told_apart_by("tag", [ref("B"), ref("C")])
    assert not alternatives.are_told_apart_by("kind", [ref("A"), ref("C")])
    assert [alternatives.demands("tag", ref(name)) for name in "ABC"] == [True, True, False]
