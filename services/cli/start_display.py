"""The classes in this file show the progress of a start.

On a terminal, a `StepList` shows a list that changes in place. If the output is not a terminal, a `StepLines` writes a
line for each step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from services.cli.start_steps import StartReporter, StartStep, StepReport

FRAMES_PER_S = 4  # enough for the spinner; more frames would take CPU time from the processes that start
NAME_WIDTH = max(map(len, StartStep))


@contextmanager
def showing(console: Console, steps: Iterable[StartStep]) -> Iterator[StartReporter]:
    """Show `steps` until the body ends: on a terminal as a list that changes in place, elsewhere as lines of text."""
    is_terminal = console.file.isatty() and not console.is_dumb_terminal
    reporter = StepList(console, steps) if is_terminal else StepLines(console)
    try:
        yield reporter
    finally:
        reporter.end()


class StepLines:
    """A `StepLines` writes a line when a step is done. It also writes a line when a long step begins."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, time.monotonic()
        self._written: set[tuple[StartStep, bool]] = set()
        self._lock = threading.Lock()

    def report(self, report: StepReport) -> None:
        key = report.step, report.is_done
        with self._lock:
            if not (report.is_done or report.is_news) or self._written & {key, (report.step, True)}:
                return
            self._written.add(key)
            seconds = time.monotonic() - self._started
            self._console.print(f"{seconds:6.1f} s  {report.step:{NAME_WIDTH}}  {report.detail}")

    def end(self) -> None:
        """Do nothing: the lines that have been written need no change at the end."""


class StepList:
    """A `StepList` shows a row for each step: a mark, the name, the seconds until the step was done, and a detail.

    Any thread may call the methods of a `StepList`.
    """

    def __init__(self, console: Console, steps: Iterable[StartStep]) -> None:
        self._started = time.monotonic()
        self._reports = {step: StepReport(step, "") for step in steps}
        self._done_at: dict[StartStep, float] = {}
        self._spinner = Spinner("dots", style="cyan")
        self._has_ended = False
        self._lock = threading.Lock()
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=FRAMES_PER_S)
        self._live.start(refresh=True)

    def report(self, report: StepReport) -> None:
        with self._lock:
            if report.step in self._done_at:
                return
            self._reports[report.step] = report
            if report.is_done:
                self._done_at[report.step] = self._seconds()

    def end(self) -> None:
        """End the display: remove the steps that never began, and mark the steps that began but were not completed."""
        with self._lock:
            self._has_ended = True
        self._live.stop()

    def render(self) -> Table:
        """Return a table that shows the present state of every step."""
        table = Table.grid("", "", Column(justify="right"), "", padding=(0, 2, 0, 0))
        with self._lock:
            for report in self._reports.values():
                if report.detail or not self._has_ended:
                    table.add_row(*self._cells(report))
        return table

    def _cells(self, report: StepReport) -> tuple[Text | Spinner, Text, Text, Text]:
        """Return the cells of a step's row: the mark, the name, the seconds and the detail."""
        name, detail = Text(report.step), Text(report.detail, overflow="fold")
        if report.is_done:
            return Text("✓", style="green"), name, Text(f"{self._done_at[report.step]:.0f} s"), detail
        if self._has_ended:
            return Text("✗", style="red"), name, Text(), detail
        if not report.detail:
            return Text("·", style="dim"), Text(report.step, style="dim"), Text(), detail
        return self._spinner, name, Text(f"{self._seconds():.0f} s", style="dim"), detail

    def _seconds(self) -> float:
        return time.monotonic() - self._started
