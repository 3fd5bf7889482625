"""`format_regex` and `encoding_regex` return regular expressions for JSON Schema's `format` and `contentEncoding`.

All regular expressions are in the syntax of Rust's regex crate and match whole texts.
"""

from __future__ import annotations

from services.gateway.schema.regex import UnsupportedPattern


def _date() -> str:
    leap_year = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
    days = [
        "[0-9]{4}-(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])",
        "[0-9]{4}-(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)",
        "[0-9]{4}-02-(?:0[1-9]|1[0-9]|2[0-8])",
        f"{leap_year}-02-29",
    ]
    # Most libraries know no year 0.
    return f"(?:{'|'.join(days)})"


DATE = _date()
ZONE = r"(?:[Zz]|[+\-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
TIME = rf"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,9}})?{ZONE}"
DURATION_TIME = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
DURATION_DATE = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOSTNAME = rf"{LABEL}(?:\.{LABEL})*"
ATOM = "[A-Za-z0-9!#$%&'*+\\x{2f}=?\\^_`{|}~\\-]+"
BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4 = rf"{BYTE}(?:\.{BYTE}){{3}}"
UNRESERVED = r"A-Za-z0-9._~!$&'()*+,;=\-"
NOT_ASCII = r"\x{a0}-\x{d7ff}\x{f900}-\x{fdcf}\x{fdf0}-\x{ffef}\x{10000}-\x{1fffd}\x{20000}-\x{2fffd}"
POINTER = r"(?:\x{2f}(?:[^~\x{2f}]|~[01])*)*"


def _ipv6() -> str:
    group, end = "[0-9A-Fa-f]{1,4}", f"(?:[0-9A-Fa-f]{{1,4}}:[0-9A-Fa-f]{{1,4}}|{IPV4})"
    forms = [f"(?:{group}:){{6}}{end}", f"::(?:{group}:){{5}}{end}"]
    for before in range(1, 5):  # RFC 3986: at most `before` groups stand before "::", and all other groups after "::"
        head = f"(?:(?:{group}:){{0,{before - 1}}}{group})?"
        forms.append(f"{head}::(?:{group}:){{{5 - before}}}{end}")
    forms.append(f"(?:(?:{group}:){{0,4}}{group})?::{end}")
    forms.append(f"(?:(?:{group}:){{0,5}}{group})?::{group}")
    forms.append(f"(?:(?:{group}:){{0,6}}{group})?::")
    return f"(?:{'|'.join(forms)})"


def _uri(more: str, is_reference: bool) -> str:
    """Return a regular expression for the URIs of RFC 3986, or, with the characters `more`, the IRIs of RFC 3987."""
    escaped = "%[0-9A-Fa-f]{2}"
    pchar = f"(?:[{UNRESERVED}:@{more}]|{escaped})"
    no_colon = f"(?:[{UNRESERVED}@{more}]|{escaped})"
    host = f"(?:\\[{_ipv6()}\\]|(?:[{UNRESERVED}{more}]|{escaped})*)"
    authority = f"\\x{{2f}}\\x{{2f}}(?:(?:[{UNRESERVED}:{more}]|{escaped})*@)?{host}(?::[0-9]*)?(?:\\x{{2f}}{pchar}*)*"
    path = f"\\x{{2f}}(?:{pchar}+(?:\\x{{2f}}{pchar}*)*)?"
    tail = f"(?:\\?(?:{pchar}|[\\x{{2f}}?])*)?(?:#(?:{pchar}|[\\x{{2f}}?])*)?"
    absolute = f"[A-Za-z][A-Za-z0-9+.\\-]*:(?:{authority}|{path}|(?:{pchar}+(?:\\x{{2f}}{pchar}*)*)?){tail}"
    if not is_reference:
        return absolute
    relative = f"(?:{authority}|{path}|(?:{no_colon}+(?:\\x{{2f}}{pchar}*)*)?){tail}"
    return f"(?:{absolute}|{relative})"


def _uri_template() -> str:
    name = "(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2})+(?:\\.(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2})+)*(?::[1-9][0-9]{0,3}|\\*)?"
    literal = f"[!#$&(-;=?-\\[\\]_a-z~{NOT_ASCII}]"
    return f"(?:{literal}|%[0-9A-Fa-f]{{2}}|\\{{[+#.\\x{{2f}};?&=,!@|]?{name}(?:,{name})*\\}})*"


FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}[Tt]{TIME}",
    "duration": f"P(?:[0-9]+W|{DURATION_DATE}(?:{DURATION_TIME})?|{DURATION_TIME})",
    "email": rf"{ATOM}(?:\.{ATOM})*@{HOSTNAME}",
    "hostname": HOSTNAME,
    "ipv4": IPV4,
    "ipv6": _ipv6(),
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": _uri("", is_reference=False),
    "uri-reference": _uri("", is_reference=True),
    "iri": _uri(NOT_ASCII, is_reference=False),
    "iri-reference": _uri(NOT_ASCII, is_reference=True),
    "uri-template": _uri_template(),
    "json-pointer": POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{POINTER})",
}
ENCODINGS = {
    "base64": "(?:[A-Za-z0-9+\\x{2f}]{4})*(?:[A-Za-z0-9+\\x{2f}]{2}==|[A-Za-z0-9+\\x{2f}]{3}=)?",
    "base64url": "(?:[A-Za-z0-9_\\-]{4})*(?:[A-Za-z0-9_\\-]{2}(?:==)?|[A-Za-z0-9_\\-]{3}=?)?",
    "base32": "(?:[A-Z2-7]{8})*(?:[A-Z2-7]{2}={6}|[A-Z2-7]{4}={4}|[A-Z2-7]{5}={3}|[A-Z2-7]{7}=)?",
    "base16": "(?:[0-9A-Fa-f]{2})*",
    "7bit": "[\\x{1}-\\x{7f}]*",
}
# formats of JSON Schema whose texts are no regular language
NOT_REGULAR = ("regex", "idn-email", "idn-hostname")


def format_regex(name: str) -> str | None:
    """Return a regular expression for texts of the format `name`, or None if the format allows all texts.

    Formats that are unknown to JSON Schema allow all texts. Raises UnsupportedPattern for a format that cannot be
    expressed as a regular expression.
    """
    if name in NOT_REGULAR:
        raise UnsupportedPattern("is not supported")
    return ENCODINGS["base64"] if name == "byte" else FORMATS.get(name)  # "byte" is OpenAPI's name for base64


def encoding_regex(name: str) -> str | None:
    """Return a regular expression for texts of the content encoding `name`, or None if all texts are allowed.

    Raises UnsupportedPattern for an unknown encoding.
    """
    if name.lower() in ("8bit", "binary"):
        return None
    if name.lower() not in ENCODINGS:
        raise UnsupportedPattern("is not supported")
    return ENCODINGS[name.lower()]
