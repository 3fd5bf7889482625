"""The `SamplingDefaults` of a model are the sampling parameters that its `generation_config.json` recommends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.engine.contract.sampling_params import SamplingParams

FILE = "generation_config.json"
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # the parameters that vLLM takes from the file
LIMIT = "max_new_tokens"


@dataclass(frozen=True)
class SamplingDefaults:
    """A `SamplingDefaults` holds the values of parameters that a client leaves out, and the longest answer.

    The meaning is vLLM's. `do_sample` has no effect: a client asks for greedy decoding with a temperature of 0.
    """

    values: Mapping[str, int | float] = field(default_factory=dict)  # by their names in SamplingParams
    max_new_tokens: int | None = None  # limit on the tokens of every answer, whatever a client asks for

    @classmethod
    def of_model(cls, generation_config: Mapping[str, Any]) -> SamplingDefaults:
        """Return the defaults in a model's `generation_config.json`; raise ValueError if a value is not allowed."""
        given = {name: generation_config[name] for name in (*NAMES, LIMIT) if generation_config.get(name) is not None}
        for name, value in given.items():
            kind = int if name in ("top_k", LIMIT) else float
            if isinstance(value, bool) or not isinstance(value, int | kind):
                noun = "an integer" if kind is int else "a number"
                raise ValueError(f"{FILE} has {name} = {value!r}; allowed is {noun}, or no value.")
        limit = given.pop(LIMIT, None)
        if limit is not None and limit < 1:
            raise ValueError(f"{FILE} has {LIMIT} = {limit}; allowed is an integer of at least 1, or no value.")
        try:
            SamplingParams(**given)
        except ValueError as error:
            raise ValueError(f"{FILE} cannot be used: {error}") from error
        return cls(given, limit)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.values.items())
