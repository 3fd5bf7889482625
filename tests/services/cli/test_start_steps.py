"""These tests make observations of a start, and check which steps are then done and which text a user reads."""

from __future__ import annotations

from dataclasses import replace

from services.cli.start_steps import SHARDS, StartGoal, StartObservation, StartStep, StepReport, steps_of, steps_to_show

GOAL = StartGoal(num_shards=3, replicas={"gateway": 1, "backbone": 1}, ports=(8000, 9000), num_cached=64)
COMPLETE = StartObservation(3, 448, 448, {"gateway": 1, "controller": 1, "backbone": 1, "experts-cpu": 3}, 64)


def reports(seen: StartObservation, goal: StartGoal = GOAL) -> dict[StartStep, StepReport]:
    return {report.step: report for report in steps_of(seen, goal)}


def done(seen: StartObservation, goal: StartGoal = GOAL) -> set[StartStep]:
    return {step for step, report in reports(seen, goal).items() if report.is_done}


def test_nothing_is_done_before_the_first_process_reports() -> None:
    by_step = reports(StartObservation(num_kernels=64))
    assert not any(report.is_done for report in by_step.values())
    assert by_step[StartStep.SHARDS].detail == "0 of 3 registered"
    assert by_step[StartStep.PLACEMENT].detail == "waiting for the shards"
    assert by_step[StartStep.GATEWAY].detail == by_step[StartStep.BACKBONE].detail == "0 of 1 running"


def test_each_step_is_done_by_its_own_evidence() -> None:
    assert done(StartObservation(running={"gateway": 1})) == {StartStep.GATEWAY}
    assert done(StartObservation(num_registered=2, num_held=100)) == set()
    assert done(StartObservation(num_registered=3)) == {StartStep.SHARDS}
    assert done(StartObservation(num_registered=3, num_homes=448)) == {StartStep.SHARDS, StartStep.PLACEMENT}
    assert done(StartObservation(running={"backbone": 1})) == {StartStep.BACKBONE, StartStep.KERNELS}


def test_every_step_is_done_at_the_end() -> None:
    by_step = reports(COMPLETE)
    assert all(report.is_done for report in by_step.values())
    assert by_step[StartStep.GATEWAY].detail == "listening on ports 8000 and 9000"
    assert by_step[StartStep.SHARDS].detail == "3 of 3 registered"
    assert by_step[StartStep.PLACEMENT].detail == "loaded, 448 homes in the first placement"
    assert by_step[StartStep.KERNELS].detail == "64 in the cache"
    assert by_step[StartStep.BACKBONE].detail == "ready for requests"


def test_loading_is_counted_while_there_is_no_placement() -> None:
    assert reports(StartObservation(3, 1_200))[StartStep.PLACEMENT].detail == "1,200 loaded"


def test_a_first_start_says_that_kernels_are_compiled() -> None:
    first = StartGoal(3, GOAL.replicas, GOAL.ports, num_cached=0)
    report = reports(StartObservation(), first)[StartStep.KERNELS]
    assert (report.detail, report.is_news) == ("compiling, because this is the first start", True)
    report = reports(StartObservation(num_kernels=7), first)[StartStep.KERNELS]
    assert report.detail == "compiling, because this is the first start: 7 so far"
    report = reports(COMPLETE, first)[StartStep.KERNELS]
    assert (report.detail, report.is_done) == ("64 compiled and kept for the next start", True)


def test_all_replicas_of_a_deployment_must_run() -> None:
    goal = StartGoal(3, {"gateway": 1, "backbone": 2}, GOAL.ports, 64)
    assert reports(COMPLETE, goal)[StartStep.BACKBONE] == StepReport(StartStep.BACKBONE, "1 of 2 running")
    both = StartObservation(running={"backbone": 2})
    assert reports(both, goal)[StartStep.BACKBONE].detail == "2 replicas ready for requests"


def test_the_reason_of_a_failed_attempt_is_shown_while_serve_tries_again() -> None:
    failures = {"backbone": "the width is 3", SHARDS: "it ran out of memory"}
    by_step = reports(StartObservation(num_registered=2, failures=failures))
    assert by_step[StartStep.BACKBONE].detail == "0 of 1 running; starting again after: the width is 3"
    assert by_step[StartStep.SHARDS].detail == "2 of 3 registered; starting again after: it ran out of memory"
    assert by_step[StartStep.BACKBONE].is_news, "a log has a line about it"
    assert not by_step[StartStep.GATEWAY].is_news
    recovered = reports(replace(COMPLETE, failures=failures))
    assert all(report.is_done for report in recovered.values())
    assert not any("again" in report.detail for report in recovered.values())


def test_steps_that_a_start_does_not_have_are_not_shown() -> None:
    assert steps_to_show(has_local_experts=False, joins_cluster=False) == list(StartStep)
    remote_only = {StartStep.STORE, StartStep.SHARDS, StartStep.PLACEMENT}
    assert set(StartStep) - set(steps_to_show(has_local_experts=True, joins_cluster=False)) == remote_only
    assert set(StartStep) - set(steps_to_show(has_local_experts=False, joins_cluster=True)) == {StartStep.KERNELS}
    local = StartGoal(0, GOAL.replicas, GOAL.ports, None)
    assert set(reports(COMPLETE, local)) == {StartStep.GATEWAY, StartStep.BACKBONE}
