"""These tests check how the steps of a start look on a terminal and in a log."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from services.cli.start_display import StepList, showing
from services.cli.start_steps import StartStep, StepReport

STEPS = (StartStep.RAY, StartStep.SHARDS, StartStep.KERNELS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def steps() -> Iterator[StepList]:
    """Yield a `StepList` whose terminal is a buffer that no test reads."""
    made = StepList(Console(file=Terminal()), STEPS)
    yield made
    made.end()


def shown(steps: StepList, width: int = 80) -> list[str]:
    output = io.StringIO()
    Console(width=width, file=output).print(steps.render())
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_a_log_has_one_line_for_each_step_that_is_done() -> None:
    output = io.StringIO()
    with showing(Console(file=output), STEPS) as reporter:
        reporter.report(StepReport(StartStep.RAY, "starting"))
        for _ in range(2):
            reporter.report(StepReport(StartStep.RAY, "running", is_done=True))
        for number in (0, 1, 2):
            reporter.report(StepReport(StartStep.SHARDS, f"{number} of 3 registered"))
        reporter.report(StepReport(StartStep.SHARDS, "3 of 3 registered", is_done=True))
    first, second = output.getvalue().splitlines()
    assert re.fullmatch(r" {3}0\.\d s  Ray            running", first)
    assert re.fullmatch(r" {3}0\.\d s  Expert shards  3 of 3 registered", second)


def test_a_log_says_once_that_a_long_step_begins() -> None:
    output = io.StringIO()
    with showing(Console(file=output), STEPS) as reporter:
        for number in (0, 1, 2):
            reporter.report(StepReport(StartStep.KERNELS, f"compiling, {number} so far", is_news=True))
        reporter.report(StepReport(StartStep.KERNELS, "3 compiled", is_done=True))
        reporter.report(StepReport(StartStep.KERNELS, "compiling, 3 so far", is_news=True))
    details = [line.partition("Kernels")[2].strip() for line in output.getvalue().splitlines()]
    assert details == ["compiling, 0 so far", "3 compiled"]


def test_a_terminal_shows_all_steps_from_the_start(steps: StepList) -> None:
    assert shown(steps) == ["·  Ray", "·  Expert shards", "·  Kernels"]
    steps.report(StepReport(StartStep.RAY, "running", is_done=True))
    steps.report(StepReport(StartStep.SHARDS, "1 of 3 registered"))
    ray, shards, kernels = shown(steps)
    assert re.fullmatch(r"✓  Ray            0 s  running", ray)
    assert re.fullmatch(r".  Expert shards  0 s  1 of 3 registered", shards)
    assert kernels == "·  Kernels"


def test_a_step_that_is_done_stays_done(steps: StepList) -> None:
    steps.report(StepReport(StartStep.SHARDS, "3 of 3 registered", is_done=True))
    steps.report(StepReport(StartStep.SHARDS, "2 of 3 registered"))
    assert shown(steps)[1].endswith("3 of 3 registered")


def test_a_start_that_fails_leaves_what_was_done_and_what_was_not(steps: StepList) -> None:
    steps.report(StepReport(StartStep.RAY, "running", is_done=True))
    steps.report(StepReport(StartStep.SHARDS, "1 of 3 registered"))
    steps.end()
    assert [line[0] for line in shown(steps)] == ["✓", "✗"]


def test_a_list_fits_a_narrow_terminal(steps: StepList) -> None:
    steps.report(StepReport(StartStep.KERNELS, "compiling, because this is the first start: 12 so far"))
    assert max(map(len, shown(steps, width=40))) <= 40


def test_the_list_of_a_terminal_ends_with_its_body() -> None:
    output = Terminal()
    terminal = Console(file=output, width=80, force_terminal=True, _environ={"TERM": "xterm"})

    def fail() -> None:
        with showing(terminal, STEPS) as reporter:
            reporter.report(StepReport(StartStep.RAY, "starting"))
            raise ValueError("no store answers")

    with pytest.raises(ValueError, match="no store answers"):
        fail()
    last_frame = output.getvalue().rpartition("\x1b[2K")[2]
    assert "Ray" in last_frame
    assert "Kernels" not in last_frame
    assert "\x1b[?25h" in output.getvalue()  # the cursor is shown again
