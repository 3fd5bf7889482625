"""`expertmesh drill --kill shard` kills one shard of this machine while the server answers requests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from services.cli.drill.drill import Disturbance, Load, under_load
from services.cli.drill.load import ask
from services.cli.drill.local_shard import local_pid
from services.cli.drill.verdict import Verdict

DEGRADED = 503  # HTTP status of /health/degraded if the server is degraded; the body still holds the report
LONGEST_GAP_S = 1.0  # a request has stalled if more seconds pass between two of its tokens
MIN_AT_S, AT_SHARE = 2.0, 0.25  # the shard is killed after AT_SHARE of the run, but not before MIN_AT_S


@dataclass(frozen=True)
class DrillResult:
    """A `DrillResult` records how well a server survived the loss of a shard.

    - `shard`: id of the shard that was killed
    - `full_cover_s`: seconds until every expert had two live homes again, or None if this took longer than the timeout
    - `verdict`: how the loss affected the requests, or None for a drill without load
    """

    shard: str
    full_cover_s: float | None
    verdict: Verdict | None

    @property
    def is_unnoticed(self) -> bool:
        """Return True if the loss affected no request, and if every expert has two live homes again.

        A request is affected if it failed, stalled, or got other tokens than in the undisturbed run.
        """
        verdict = self.verdict
        is_good = verdict is None or (
            verdict.num_failed == verdict.num_different == 0 and verdict.longest_gap_s < LONGEST_GAP_S
        )
        return is_good and self.full_cover_s is not None

    def to_dict(self) -> dict[str, Any]:
        verdict = {} if self.verdict is None else self.verdict.to_dict()
        return {"shard": self.shard, "full_cover_s": self.full_cover_s, "is_unnoticed": self.is_unnoticed, **verdict}

    def describe(self) -> str:
        """Return the result as sentences, one sentence per line."""
        cover = "not within two minutes" if self.full_cover_s is None else f"after {self.full_cover_s:.1f} s"
        lines = [f"Killed {self.shard}. Full cover again {cover}."]
        if (verdict := self.verdict) is not None:
            lines += [
                f"{verdict.num_requests} requests: {verdict.num_failed} failed, {verdict.num_different} with other "
                "tokens than in the undisturbed run.",
                f"Longest gap between two tokens: {1e3 * verdict.longest_gap_s:.0f} ms, undisturbed "
                f"{1e3 * verdict.undisturbed_gap_s:.0f} ms.",
                f"Throughput in the {verdict.window_s:.0f} s after the kill: {verdict.tokens_per_s:.1f} tokens/s, "
                f"undisturbed {verdict.undisturbed_tokens_per_s:.1f} ({-verdict.dip:+.1%}).",
            ]
        return "\n".join(lines)


async def drill_shard(url: str, shard_id: str, load: tuple[float, float, int] | None) -> DrillResult:
    """Kill the shard `shard_id`, and return how the server survived the loss.

    If `shard_id` is empty, the shard with the most picks is killed. `load` is the tuple (requests per second, seconds
    of a run, tokens of a request), or None for a drill without load. Raises ValueError if this machine has no such
    shard, or if requests fail in the undisturbed run.
    """
    url = url.rstrip("/")
    async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
        victim = _victim(await _json(client, "/status"), shard_id)
        # The process is looked up before any load is sent: if the shard is on another machine, the drill ends here.
        pid = await local_pid(victim["id"], victim["endpoint"])

        async def kill() -> None:
            os.kill(pid, signal.SIGKILL)

        is_whole = _watch(client, victim["id"])
        if load is None:
            return DrillResult(victim["id"], await Disturbance(kill, is_whole, 0.0).run(), None)
        rate, seconds, max_tokens = load
        steady = Load.of_sentences(url, rate, seconds, max_tokens)
        # Two requests are sent first and not measured, because a server's first requests take longer.
        await asyncio.gather(*(ask(steady.url, body, 0.0) for body in steady.bodies[-2:]))
        at_s = max(MIN_AT_S, AT_SHARE * seconds)
        verdict, whole_s = await under_load(steady, Disturbance(kill, is_whole, at_s))
        return DrillResult(victim["id"], whole_s, verdict)


def _victim(status: dict[str, Any], shard_id: str) -> dict[str, Any]:
    shards: dict[str, dict[str, Any]] = {shard["id"]: shard for shard in status.get("shards", [])}
    if not shards:
        raise ValueError("the server has no shards; start a server without --local-experts")
    if not shard_id:
        return max(shards.values(), key=lambda shard: (shard["picks_per_s"], shard["num_held"]))
    if shard_id not in shards:
        raise ValueError(f"there is no shard {shard_id!r}; there are {', '.join(sorted(shards))}")
    return shards[shard_id]


def _watch(client: httpx.AsyncClient, shard_id: str) -> Callable[[], Awaitable[bool]]:
    async def is_whole() -> bool:
        """Return True if every expert has two live homes and no part of the placement relies on the killed shard."""
        try:
            report = await _json(client, "/health/degraded")
        except ValueError:
            return False  # a server that does not answer has not recovered
        return report["status"] == "covered" and shard_id not in report["blast_radius"]

    return is_whole


async def _json(client: httpx.AsyncClient, path: str) -> Any:
    try:
        answer = await client.get(path)
    except httpx.HTTPError as error:
        raise ValueError(f"no Expertmesh server answers at {client.base_url} ({type(error).__name__})") from None
    if answer.is_error and answer.status_code != DEGRADED:
        raise ValueError(f"{client.base_url}{path} answered {answer.status_code}")
    return answer.json()
