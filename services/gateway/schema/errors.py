"""An `UnsupportedKeyword` says which keyword of a JSON schema a grammar cannot express, and why."""

from __future__ import annotations


class UnsupportedKeyword(ValueError):
    """An `UnsupportedKeyword` names a keyword of a JSON schema that a grammar cannot express."""

    def __init__(self, path: str, reason: str) -> None:
        """Make the sentence from `path`, such as `properties.x.pattern`, and `reason`, the rest of the sentence."""
        super().__init__(f"{path.lstrip('.')} {reason}.")
