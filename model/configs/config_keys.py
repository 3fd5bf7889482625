"""`ConfigKeys` read values from a `config.json`, or from another config, and check each value when it is read.

A missing or wrong value raises ValueError with the key, the value and the allowed values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from model.configs.model_files import CONFIG

LISTED = {str: "names", int: "integers"}


@dataclass(frozen=True)
class ConfigKeys:
    """`ConfigKeys` are the keys of a parsed `config.json`, whose values are checked when they are read.

    A key whose value is null counts as missing. `place` stands before the keys in messages; for example "rope_scaling."
    if `raw` is the object under the key rope_scaling. `file` is the name of the config, also for messages.
    """

    raw: Mapping[str, Any]
    place: str = ""
    file: str = CONFIG

    def need(self, *keys: str) -> int:
        """Return the value of the first of `keys` that is not missing, a positive integer; one of them is required."""
        key = next((key for key in keys if self.raw.get(key) is not None), keys[-1])
        value = self._required(key)
        if not _is_whole(value) or value < 1:
            raise self.wrong(key, "allowed is a positive integer")
        return int(value)

    def whole(self, key: str, default: int | None = None) -> int:
        """Return the value of `key`, an integer of at least 0; the key is required if there is no `default`."""
        value = self._required(key) if default is None else self._given(key, default)
        if not _is_whole(value) or value < 0:
            raise self.wrong(key, "allowed is an integer from 0 up")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Return the value of `key`, a finite number of at least 0; the key is required if there is no `default`."""
        value = self._required(key) if default is None else self._given(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
            raise self.wrong(key, "allowed is a number from 0 up")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return the value of `key`, a boolean, or `default` if the key is missing."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "allowed are true and false")
        return value

    def items(self, key: str, kind: type[str] | type[int]) -> list[Any]:
        """Return the value of `key`, a list with items of type `kind`; empty if the key is missing."""
        values = self._given(key, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise self.wrong(key, f"allowed is a list of {LISTED[kind]}")
        return values

    def section(self, key: str) -> ConfigKeys:
        """Return the keys of the object under `key`; no keys if the key is missing."""
        value = self._given(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, "allowed is an object")
        return ConfigKeys(value, f"{self.place}{key}.", self.file)

    def check_fixed(self, fixed: Mapping[str, Collection[Any]]) -> None:
        """Raise ValueError if a key of `fixed` is present with a value that is not among its supported values."""
        for key, supported in fixed.items():
            if key in self.raw and self.raw[key] not in supported:
                raise self.wrong(key, f"supported is {' or '.join(map(repr, supported))}")

    def wrong(self, key: str, what_is_allowed: str) -> ValueError:
        """Return an error that names `key` and its value, and says what is allowed instead."""
        return ValueError(f"{self.file} has {self.place}{key} = {self.raw.get(key)!r}; {what_is_allowed}")

    def _given(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def _required(self, key: str) -> Any:
        value = self.raw.get(key)
        if value is None:
            raise ValueError(f"{self.file} lacks the key {self.place}{key}")
        return value


def check_divides(large: str, whole: int, small: str, part: int) -> None:
    """Raise ValueError if `part`, the value of the key `small`, does not divide `whole`, the value of `large`."""
    if part < 1 or whole % part:
        raise ValueError(f"config.json has {large} = {whole}, which {small} = {part} does not divide")


def check_mtp_layers(num_layers: int) -> None:
    """Raise ValueError if a model has another number of MTP modules than 0 or 1."""
    if num_layers not in (0, 1):
        raise ValueError(f"config.json has num_nextn_predict_layers = {num_layers!r}; supported are 0 and 1")


def check_router(
    num_experts: tuple[str, int], top_k: int, num_groups: tuple[str, int] = ("n_group", 1), top_groups: int = 1
) -> None:
    """Raise ValueError if a router cannot choose `top_k` experts from `top_groups` of the groups of experts.

    `num_experts` and `num_groups` are each a key and its value.
    """
    check_divides(*num_experts, *num_groups)
    chosen = (("num_experts_per_tok", top_k, num_experts), ("topk_group", top_groups, num_groups))
    for small, value, (large, most) in chosen:
        if not 1 <= value <= most:
            raise ValueError(f"config.json has {small} = {value}; allowed is 1 to {large} = {most}")
    if top_k > (most := top_groups * (num_experts[1] // num_groups[1])):
        picks = f"num_experts_per_tok = {top_k}"
        raise ValueError(f"config.json has {picks}, but topk_group allows only {most} experts per token")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
