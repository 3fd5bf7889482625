"""`compare` tells what a disturbance changed between two runs that sent the same requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from services.cli.drill.load import RequestOutcome


@dataclass(frozen=True)
class Verdict:
    """A `Verdict` says how a disturbed run differs from the undisturbed run. Times are in seconds.

    - `errors`: number of failed requests by kind of error
    - `num_different`: number of requests with another text or another number of tokens than in the undisturbed run
    - `longest_gap_s`: longest time between two consecutive pieces of one answer in the disturbed run
    - `undisturbed_gap_s`: the same time in the undisturbed run
    - `longest_ttft_s`: longest time to the first token in the disturbed run
    - `tokens_per_s`: throughput of the disturbed run in the `window_s` seconds after the disturbance
    - `undisturbed_tokens_per_s`: throughput of the undisturbed run in the same seconds
    """

    num_requests: int
    num_failed: int
    errors: dict[str, int]
    num_different: int
    longest_gap_s: float
    undisturbed_gap_s: float
    longest_ttft_s: float
    window_s: float
    tokens_per_s: float
    undisturbed_tokens_per_s: float

    @property
    def dip(self) -> float:
        """Return the throughput that the disturbance cost, as a share of the undisturbed throughput.

        The share is negative if the disturbed run had the higher throughput.
        """
        usual = self.undisturbed_tokens_per_s
        return 1.0 - self.tokens_per_s / usual if usual else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "dip": self.dip}


def compare(
    undisturbed: Sequence[RequestOutcome], disturbed: Sequence[RequestOutcome], disturbed_at: float, window_s: float
) -> Verdict:
    """Compare two runs that sent the same requests in the same order, and return the verdict.

    The disturbance came `disturbed_at` seconds after the start of the run. The throughput is compared in the `window_s`
    seconds after the disturbance. Raises ValueError if the runs sent different numbers of requests, or if a request of
    the undisturbed run failed.
    """
    if len(undisturbed) != len(disturbed):
        raise ValueError(f"The runs cannot be compared: {len(undisturbed)} requests were sent, then {len(disturbed)}.")
    if failed := [outcome.error for outcome in undisturbed if outcome.error]:
        raise ValueError(
            f"{len(failed)} of {len(undisturbed)} requests failed even without a disturbance ({failed[0]})."
        )
    pairs = [(before, after) for before, after in zip(undisturbed, disturbed, strict=True) if not after.error]
    different = [1 for before, after in pairs if _answer_of(before) != _answer_of(after)]
    window = disturbed_at, disturbed_at + window_s
    return Verdict(
        num_requests=len(disturbed),
        num_failed=len(disturbed) - len(pairs),
        errors=dict(Counter(outcome.error for outcome in disturbed if outcome.error)),
        num_different=len(different),
        longest_gap_s=longest_gap(disturbed),
        undisturbed_gap_s=longest_gap(undisturbed),
        longest_ttft_s=max((after.ttft_s for _, after in pairs), default=0.0),
        window_s=window_s,
        tokens_per_s=num_tokens(disturbed, *window) / window_s,
        undisturbed_tokens_per_s=num_tokens(undisturbed, *window) / window_s,
    )


def _answer_of(outcome: RequestOutcome) -> tuple[str, int]:
    return outcome.text, outcome.num_generated


def longest_gap(outcomes: Sequence[RequestOutcome]) -> float:
    """Return the longest time in seconds between two consecutive pieces of one answer; incomplete answers count too."""
    return max((gap for outcome in outcomes for gap in outcome.gaps_s), default=0.0)


def num_tokens(outcomes: Sequence[RequestOutcome], start: float, end: float) -> float:
    """Return the number of tokens that arrived between `start` and `end`, two times in seconds from the run's start.

    An answer's tokens are divided evenly among its stream events with text, so the number may be a fraction.
    """
    return sum(
        outcome.num_generated / len(outcome.event_times) * sum(start <= at < end for at in outcome.event_times)
        for outcome in outcomes
        if outcome.event_times
    )
