"""Which bytes each expert is made of: the first sight of an expert is recorded, and whatever differs later is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Checksums = Mapping[int, Mapping[int, int]]  # by layer and expert


@dataclass(frozen=True)
class Mismatch:
    """An expert whose bytes are not those that were seen first."""

    layer: int
    expert: int
    known: int
    seen: int

    def __str__(self) -> str:
        numbers = f"the checksum {self.seen:016x}, but the manifest says {self.known:016x}"
        return f"Expert {self.expert} of layer {self.layer} has {numbers}: it must not be served."


@dataclass(frozen=True)
class Manifest:
    """The checksums that were seen first, of one checkpoint in one dtype."""

    known: Checksums = field(default_factory=dict)

    def mismatches(self, seen: Checksums) -> list[Mismatch]:
        """What differs from what is known, in order of layers and experts."""
        return [
            Mismatch(layer, expert, self.known[layer][expert], checksum)
            for layer, checksums in sorted(seen.items())
            for expert, checksum in sorted(checksums.items())
            if self.known.get(layer, {}).get(expert, checksum) != checksum
        ]


def weights_name(model_digest: str, dtype: str) -> str:
    """What a registry keeps a manifest under: the same checkpoint has other bytes in another dtype."""
    return f"{model_digest}:{dtype}"
