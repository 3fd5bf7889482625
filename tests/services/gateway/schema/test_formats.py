from __future__ import annotations

import re

import pytest

from services.gateway.schema.formats import FORMATS, encoding_regex, format_regex
from services.gateway.schema.regex import UnsupportedPattern
from tests.services.gateway.schema.test_regex import as_python

# for each format, texts that have it, and texts that do not
TEXTS: dict[str, tuple[list[str], list[str]]] = {
    "date": (["2024-02-29", "2000-02-29", "2023-12-31"], ["2023-02-29", "1900-02-29", "2023-04-31", "2023-1-1"]),
    "time": (["00:00:00Z", "23:59:59.123+02:00"], ["24:00:00Z", "12:00:00", "12:00Z"]),
    "date-time": (["2024-02-29T12:00:00Z", "2024-01-01t00:00:00.5-08:00"], ["2024-02-29", "2024-02-30T12:00:00Z"]),
    "duration": (["P1D", "PT5M", "P1Y2M3DT4H5M6S", "P3W"], ["P", "PT", "1D", "P1Y3D", "P1WT1H"]),
    "email": (["a@b", "first.last+tag@sub.example.org"], ["a", "@b", "a@", "a b@c", "a@-b", ".a@b", "a@b."]),
    "hostname": (["a", "a-b.example"], ["-a", "a-", "a..b", "a_b", "a" * 64]),
    "ipv4": (["0.0.0.0", "255.255.255.255"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
    "ipv6": (
        ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "fe80::1:2", "::ffff:1.2.3.4", "1:2:3:4:5:6:7::", "1::8", "1:2::7:8"],
        [
            "",
            ":",
            ":::",
            "1:2:3:4:5:6:7",
            "1:2:3:4:5:6:7:8:9",
            "1::2::3",
            "12345::",
            "1:2:3:4:5:6:7:8::",
            "::1.2.3.256",
        ],
    ),
    "uuid": (
        ["123e4567-e89b-12d3-a456-426614174000"],
        ["123e4567e89b12d3a456426614174000", "g23e4567-e89b-12d3-a456-42"],
    ),
    "uri": (
        ["http://a/b?c=d#e", "urn:a:b", "mailto:a@b", "file:///x", "http://[::1]:80/"],
        ["a/b", "//a", "a b:c", "http:// a"],
    ),
    "uri-reference": (["", "a/b", "../c?d", "#e", "//host/x", "http://a"], ["a b", "\\", "%zz"]),
    "iri": (["http://é/ü"], ["é", "a b"]),
    "iri-reference": (["é/ü", "http://é"], ["a b"]),
    "uri-template": (["/a/{b}", "{?x,y*}", "http://a/{+path:3}"], ["{", "{}", "a b"]),
    "json-pointer": (["", "/a/0/~0~1"], ["a", "/~2"]),
    "relative-json-pointer": (["0", "1/a", "2#"], ["", "/a", "01", "-1"]),
}


def test_each_format_has_examples() -> None:
    assert TEXTS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", TEXTS)
def test_formats(name: str) -> None:
    regex = re.compile(as_python(format_regex(name) or ""))
    good, bad = TEXTS[name]
    assert [text for text in good if not regex.fullmatch(text)] == []
    assert [text for text in bad if regex.fullmatch(text)] == []


def test_formats_without_a_grammar_and_formats_of_others() -> None:
    for name in ("regex", "idn-email", "idn-hostname"):
        with pytest.raises(UnsupportedPattern, match="is not supported"):
            format_regex(name)
    assert format_regex("int64") is format_regex("password") is None
    assert format_regex("byte") == encoding_regex("base64")
    assert encoding_regex("binary") is None
    with pytest.raises(UnsupportedPattern, match="is not supported"):
        encoding_regex("quoted-printable")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("base64", ["", "aGk=", "aGkh", "aA=="], ["a", "aGk", "aG-_", "aGk=="]),
        ("base64url", ["", "aGk=", "aGk", "_-aA"], ["a", "aG+/"]),
        ("base32", ["", "ORSXG5A="], ["ORSXG5A", "orsxg5a="]),
        ("BASE16", ["", "0aFF"], ["0", "0g"]),
        ("7bit", ["a b"], ["é"]),
    ],
)
def test_encodings(name: str, good: list[str], bad: list[str]) -> None:
    regex = re.compile(as_python(encoding_regex(name) or ""))
    assert [text for text in good if not regex.fullmatch(text)] == []
    assert [text for text in bad if regex.fullmatch(text)] == []
