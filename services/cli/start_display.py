"""How a start looks: a list of steps that changes in place on a terminal, or else one line for each step."""

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

FRAMES_PER_S = 4  # enough for a spinner to turn; more would take processor time from the processes that start
NAME_WIDTH = max(map(len, StartStep))


@contextmanager
def showing(console: Console, steps: Iterable[StartStep]) -> Iterator[StartReporter]:
    """Show `steps` until the body ends: as a changing list on a terminal, or else as lines of text."""
    if console.file.isatty() and not console.is_dumb_terminal:
        display = StepList(steps)
        with Live(console=console, get_renderable=display.render, refresh_per_second=FRAMES_PER_S):
            try:
                yield display
            finally:
                display.end()
    else:
        yield StepLines(console)


class StepLines:
    """Writes a line when a step is done, and one when a step that takes long begins. Any thread may report."""

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


class StepList:
    """The steps as a table: a mark, the name, how far the step is, and the second in which it was done.

    Any thread may report or render.
    """

    def __init__(self, steps: Iterable[StartStep]) -> None:
        self._started = time.monotonic()
        self._reports = {step: StepReport(step, "") for step in steps}
        self._done_at: dict[StartStep, float] = {}
        self._spinner = Spinner("dots", style="cyan")
        self._has_ended = False
        self._lock = threading.Lock()

    def report(self, report: StepReport) -> None:
        with self._lock:
            if report.step in self._done_at:
                return
            self._reports[report.step] = report
            if report.is_done:
                self._done_at[report.step] = self._seconds()

    def end(self) -> None:
        """Take the steps that never began out of the list; mark those that were not completed."""
        with self._lock:
            self._has_ended = True

    def render(self) -> Table:
        """Return the list as it is now."""
        table = Table.grid("", "", Column(justify="right"), "", padding=(0, 2, 0, 0))
        with self._lock:
            for report in self._reports.values():
                if report.detail or not self._has_ended:
                    table.add_row(*self._cells(report))
        return table

    def _cells(self, report: StepReport) -> tuple[Text | Spinner, Text, Text, Text]:
        """Return a step's mark, name, seconds and detail: done, abandoned, not begun, or in progress."""
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
