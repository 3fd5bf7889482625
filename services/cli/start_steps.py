"""The start of the application consists of steps. `steps_of` computes the progress of each step from an observation.

`steps_of` is a pure function. `services/cli/local_application.py` observes the start, and
`services/cli/start_display.py` shows the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

SHARDS = "shards"  # stands for the deployments of all pools in `StartObservation.failures`


class StartStep(StrEnum):
    """A `StartStep` is one step of the application's start. The enum's values are the names that a user sees.

    The steps are displayed in the order of the members.
    """

    MODEL = "Model"
    STORE = "Store"
    RAY = "Ray"
    GATEWAY = "Gateway"
    SHARDS = "Expert shards"
    PLACEMENT = "Experts"
    KERNELS = "Kernels"
    BACKBONE = "Backbone"


@dataclass(frozen=True)
class StepReport:
    """A `StepReport` tells the progress of one step of a start.

    - `detail`: a phrase without a full stop
    - `is_done`: True if the step is complete; a log has a line for every complete step
    - `is_news`: True if a long step begins; a log has a line for the beginning of a long step too
    """

    step: StartStep
    detail: str
    is_done: bool = False
    is_news: bool = False


class StartReporter(Protocol):
    """A `StartReporter` shows the steps of a start to a user. Any thread may call the methods of a reporter."""

    def report(self, report: StepReport) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class StartGoal:
    """A `StartGoal` lists the parts of an application that must run before the application is ready.

    - `num_shards`: number of shards that must be registered; 0 if the backbone computes the experts
    - `replicas`: for each deployment's name, the number of replicas that must run
    - `ports`: the REST port and the gRPC port
    - `num_cached`: number of compiled kernels on disk before the start; None if the kernels are on other machines
    """

    num_shards: int
    replicas: Mapping[str, int]
    ports: tuple[int, int]
    num_cached: int | None = None


@dataclass(frozen=True)
class StartObservation:
    """A `StartObservation` is the state of a start at one moment, from the registry, Ray Serve and the kernels' folder.

    - `num_registered`: number of shards with a live record in the registry
    - `num_held`: sum over the shards of the number of experts that a shard holds, as of the shard's last heartbeat
    - `num_homes`: number of homes in the first placement, or None before the first placement is published
    - `running`: for each deployment's name, the number of replicas that run
    - `num_kernels`: number of compiled kernels on this machine's disk
    - `failures`: for each deployment with a replica that failed to start, the reason; pools share the name SHARDS
    """

    num_registered: int = 0
    num_held: int = 0
    num_homes: int | None = None
    running: Mapping[str, int] = field(default_factory=dict)
    num_kernels: int = 0
    failures: Mapping[str, str] = field(default_factory=dict)


def steps_to_show(has_local_experts: bool, joins_cluster: bool) -> list[StartStep]:
    """Return the steps of a start in the order of the display.

    Local experts need no store, no shards and no placement, so the steps for these are left out. A cluster that was
    already running may compile kernels on other machines, where this process cannot count the kernels. In that case the
    step for kernels is left out.
    """
    left_out = {StartStep.STORE, StartStep.SHARDS, StartStep.PLACEMENT} if has_local_experts else set()
    return [step for step in StartStep if step not in left_out and not (joins_cluster and step is StartStep.KERNELS)]


def steps_of(seen: StartObservation, goal: StartGoal) -> Iterator[StepReport]:
    """Yield a report for every step that comes after the start of Ray Serve."""
    listening = f"listening on ports {goal.ports[0]} and {goal.ports[1]}"
    yield _replicas(StartStep.GATEWAY, seen, goal, listening)
    if goal.num_shards:
        has_all = seen.num_registered >= goal.num_shards
        count = f"{seen.num_registered} of {goal.num_shards} registered"
        yield StepReport(StartStep.SHARDS, count, has_all) if has_all else _begun(StartStep.SHARDS, count, SHARDS, seen)
        yield _placement(seen)
    if goal.num_cached is not None:
        yield _kernels(seen, goal, goal.num_cached)
    yield _replicas(StartStep.BACKBONE, seen, goal, "ready for requests")


def _replicas(step: StartStep, seen: StartObservation, goal: StartGoal, done: str) -> StepReport:
    deployment = step.value.lower()
    num_wanted, num_running = goal.replicas[deployment], seen.running.get(deployment, 0)
    if num_running < num_wanted:
        return _begun(step, f"{num_running} of {num_wanted} running", deployment, seen)
    return StepReport(step, done if num_wanted == 1 else f"{num_wanted} replicas {done}", is_done=True)


def _begun(step: StartStep, count: str, deployment: str, seen: StartObservation) -> StepReport:
    """Return the report on a step whose replicas do not all run yet, with the reason if the last attempt failed."""
    reason = seen.failures.get(deployment)
    return StepReport(step, f"{count}; starting again after: {reason}" if reason else count, is_news=bool(reason))


def _placement(seen: StartObservation) -> StepReport:
    if seen.num_homes is not None:
        detail = f"loaded, {seen.num_homes:,} homes in the first placement"
        return StepReport(StartStep.PLACEMENT, detail, is_done=True)
    return StepReport(StartStep.PLACEMENT, f"{seen.num_held:,} loaded" if seen.num_held else "waiting for the shards")


def _kernels(seen: StartObservation, goal: StartGoal, num_cached: int) -> StepReport:
    """Return the report on the compilation of kernels.

    The step is done when all backbones run: before a backbone is ready, its warm-up compiles the last kernel.
    """
    num_compiled = max(0, seen.num_kernels - num_cached)
    is_done = seen.running.get("backbone", 0) >= goal.replicas["backbone"]
    if not num_cached and not is_done:
        count = f": {num_compiled} so far" if num_compiled else ""
        return StepReport(StartStep.KERNELS, f"compiling, because this is the first start{count}", is_news=True)
    if num_compiled:
        return StepReport(StartStep.KERNELS, f"{num_compiled} compiled and kept for the next start", is_done)
    return StepReport(StartStep.KERNELS, f"{seen.num_kernels} in the cache", is_done)
