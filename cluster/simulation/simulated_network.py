"""The `SimNetwork` delays, loses and repeats the messages of a simulated fleet."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

MIN_HOP_S, MAX_HOP_S = 0.0002, 0.004  # Seconds that a message takes from one process to another.


@dataclass
class SimNetwork:
    """A `SimNetwork` decides how long each message takes, and which messages are lost or arrive twice.

    - `loss`: the probability that a message is lost.
    - `repeats`: the probability that a message arrives twice.
    - `cut`: pairs of process names between which every message is lost.
    """

    random: Random
    loss: float = 0.0
    repeats: float = 0.0
    cut: set[frozenset[str]] = field(default_factory=set)

    def hop_s(self) -> float:
        """Draw how many seconds a message takes; short times are more frequent than long times."""
        return MIN_HOP_S + self.random.random() ** 3 * (MAX_HOP_S - MIN_HOP_S)

    def loses(self, source: str, target: str) -> bool:
        """Decide at random whether a message from `source` to `target` is lost."""
        is_lost = self.loss > 0 and self.random.random() < self.loss
        return is_lost or (bool(self.cut) and frozenset((source, target)) in self.cut)

    def is_repeated(self) -> bool:
        """Decide at random whether a message arrives twice."""
        return self.repeats > 0 and self.random.random() < self.repeats
