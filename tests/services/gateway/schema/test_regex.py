"""The tests compare converted patterns with Python's regular expressions, which agree with ECMA-262 on these."""

from __future__ import annotations

import re
import string
from random import Random

import pytest

from services.gateway.schema.regex import ANY_TEXT, UnsupportedPattern, literal, whole_match

PATTERNS = [
    "",
    "a",
    "^a",
    "a$",
    "^$",
    "^a$|b",
    "^(a|b)$",
    "(^a|b)c",
    "a(b|c$)",
    "(?:^|,)a(?:,|$)",
    "a/b",
    "[^/]+/",
    "^[\\w-]+@[a-c.]+$",
    "a{2}",
    "a{2,}b?",
    "^a{1,2}?$",
    "{a}",
    "\\d\\.\\D",
    "[\\d,-]",
    "[a\\-c]",
    "[\\]^]",
    "[&&~~]",
    "\\x61\\u0062\\u{63}".replace("\\u{63}", "c"),
    "(?<n>a)b",
    "^(?:(?:a))$",
    "\\/\\$",
    "a|",
    "((a)|(b))*c",
    "<a>",
]
ALPHABET = "abc12,./@-<>&~{}^]$ \n" + "é"


def as_python(regex: str) -> str:
    return re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: f"\\U{int(found[1], 16):08x}", regex)


@pytest.mark.filterwarnings("ignore:Possible set:FutureWarning")  # in Python's future, "&&" and "~~" are operators
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_converted_pattern_matches_the_same_texts(pattern: str) -> None:
    # In Python, `$` also matches before a line end at the end, and `\d` matches digits of all scripts.
    original = re.compile(pattern.replace("$", "\\Z").replace("\\\\Z", "\\$").replace("(?<n>", "(?:"), re.ASCII)
    converted = re.compile(as_python(whole_match(pattern)))
    rng = Random(pattern)
    for _ in range(3000):
        text = "".join(rng.choices(ALPHABET, k=rng.randrange(7)))
        assert bool(original.search(text)) == bool(converted.fullmatch(text)), text


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("a(?=b)", r"looks ahead with '\(\?='"),
        ("(?<!a)b", r"looks behind with '\(\?<!'"),
        ("(a)\\1", "refers back to a group"),
        ("(?<n>a)\\k<n>", "refers back to a group"),
        ("\\bfoo", r"has a word boundary '\\b'"),
        ("a^b", r"has a '\^' in its middle"),
        ("(a$)*b", r"has a '\$' in its middle"),
        ("a{4001}", "repeats a part more than 4000 times"),
        ("(a", r"has a '\(' without '\)'"),
        ("a)", r"has a '\)' without '\('"),
        ("[a", "ends too early"),
        ("*a", r"has a '\*' that repeats nothing"),
        ("\\", "ends too early"),
        ("\\ud83d", "has an escape that is no Unicode character"),
        ("[]", r"has an empty class '\[\]'"),
        ("[b-a]", "has a range of characters in the wrong order"),
        ("a{2,1}", "has numbers of repetitions in the wrong order"),
        ("(?i:a)", "has a group with flags"),
        ("(" * 60 + ")" * 60, "nests more than 50 groups"),
        ("x" * 5000, "is longer than 4096 characters"),
        ("(^|a)" * 40, "has"),
        ("(?<n", "ends too early"),
        ("\\p{", "ends too early"),
    ],
)
def test_what_cannot_be_converted(pattern: str, reason: str) -> None:
    with pytest.raises(UnsupportedPattern, match=f"^{reason}"):
        whole_match(pattern)


def test_escapes_and_literals() -> None:
    assert whole_match("^\\ud83d\\ude00$") == literal("😀") == "\\x{1f600}"
    assert whole_match("^\\p{L}[\\P{Lu}]$") == "\\p{L}[\\P{Lu}]"
    assert whole_match("^[^]$") == "(?s:.)"
    assert whole_match("^\\cJ[\\b]$") == "\\x{a}[\\x{8}]"
    assert whole_match("^a{,2}$") == "a" + literal("{,2}")
    assert whole_match("") == ANY_TEXT + ANY_TEXT
    assert literal(string.printable).isprintable()
