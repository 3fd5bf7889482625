"""A `RopeShape` holds the settings of rotary position embeddings (RoPE), in every public dialect of a config.

| dialect | theta | scaling |
|---|---|---|
| public files | `rope_theta` | `rope_scaling`: null, or an object with `type` or `rope_type` |
| files saved by transformers 5 | `rope_parameters.rope_theta` | `rope_parameters.rope_type` and the keys beside it |
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from model.configs.config_keys import ConfigKeys

DEFAULT_THETA = 10_000.0
TYPES = ("default", "yarn")


@dataclass(frozen=True)
class YarnScaling:
    """A `YarnScaling` holds the settings of YaRN (arXiv 2309.00071), which stretches RoPE to longer contexts.

    `mscale` and `mscale_all_dim` are 0 if the config does not give them.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale: float) -> float:
        """Return m = 0.1 · mscale · ln(factor) + 1, and 1 if the factor does not stretch."""
        return 0.1 * mscale * log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def rotation_factor(self) -> float:
        """Return the factor of the cosines and sines: the ratio of both magnitudes if the config gives both."""
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)


@dataclass(frozen=True)
class RopeShape:
    """A `RopeShape` holds the settings of RoPE for the first `dim` numbers of a head's query and key.

    A rotated pair is (2i, 2i + 1) if the pairs are interleaved, else (i, i + dim/2).
    """

    dim: int
    theta: float
    is_interleaved: bool
    yarn: YarnScaling | None = None


def rope_shape(keys: ConfigKeys, head_dim: int, partial: float = 1.0, is_interleaved: bool = False) -> RopeShape:
    """Read the settings of RoPE for heads of `head_dim` numbers.

    `partial` is the rotated share of a head if the config does not give it. Raises ValueError for a type of RoPE other
    than the default and YaRN.
    """
    nested = keys.section("rope_parameters")
    scaling = nested if nested.raw else keys.section("rope_scaling")
    key = next((key for key in ("rope_type", "type") if scaling.raw.get(key) is not None), "rope_type")
    if (kind := scaling.raw.get(key, TYPES[0])) not in TYPES:
        raise scaling.wrong(key, f"supported are {' and '.join(TYPES)}")
    theta = nested.number("rope_theta", keys.number("rope_theta", DEFAULT_THETA))
    share = nested.number("partial_rotary_factor", keys.number("partial_rotary_factor", partial))
    dim = int(head_dim * share)
    if theta <= 1 or dim % 2 or not 0 < dim <= head_dim:
        what = f"RoPE with theta = {theta:g} for {dim} of the {head_dim} numbers of a head"
        raise ValueError(f"config.json asks for {what}; allowed are theta > 1 and an even part of a head")
    yarn = _yarn(scaling, keys.need("max_position_embeddings")) if kind == "yarn" else None
    return RopeShape(dim, theta, is_interleaved, yarn)


def _yarn(scaling: ConfigKeys, max_position: int) -> YarnScaling:
    scaling.check_fixed({"truncate": (True, None), "attention_factor": (None,)})
    original = scaling.whole("original_max_position_embeddings", max_position) or max_position
    factor = scaling.number("factor", max_position / original)
    if not factor:
        raise scaling.wrong("factor", "allowed is a number above 0")
    return YarnScaling(
        factor,
        original,
        scaling.number("beta_fast", 32.0) or 32.0,  # as in transformers, 0 stands for the default
        scaling.number("beta_slow", 1.0) or 1.0,
        scaling.number("mscale", 0.0),
        scaling.number("mscale_all_dim", 0.0),
    )
