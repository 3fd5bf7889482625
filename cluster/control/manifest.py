"""The `Manifest` records the checksum of every expert's weights when the expert is first loaded.

Later loads are verified against the manifest, so that all shards serve the same weights of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Checksums = Mapping[int, Mapping[int, int]]  # The checksums by layer and expert.


@dataclass(frozen=True)
class Mismatch:
    """A `Mismatch` is an expert whose loaded weights have another checksum than the manifest records.

    `known` is the checksum in the manifest, and `seen` is the checksum of the loaded weights.
    """

    layer: int
    expert: int
    known: int
    seen: int

    def __str__(self) -> str:
        numbers = f"the checksum {self.seen:016x}, but the manifest says {self.known:016x}"
        return f"Expert {self.expert} of layer {self.layer} has {numbers}: it must not be served."


@dataclass(frozen=True)
class Manifest:
    """A `Manifest` holds the recorded checksums of one checkpoint in one dtype."""

    known: Checksums = field(default_factory=dict)

    def mismatches(self, seen: Checksums) -> list[Mismatch]:
        """Return a mismatch for each expert whose checksum in `seen` differs from the manifest, in layer order."""
        return [
            Mismatch(layer, expert, self.known[layer][expert], checksum)
            for layer, checksums in sorted(seen.items())
            for expert, checksum in sorted(checksums.items())
            if self.known.get(layer, {}).get(expert, checksum) != checksum
        ]


def weights_name(model_digest: str, dtype: str) -> str:
    """Return the name under which the registry keeps the manifest of one checkpoint in one dtype.

    The dtype is part of the name, because the checkpoint's weights have different bytes in each dtype. The checksums
    are therefore different, too.
    """
    return f"{model_digest}:{dtype}"
