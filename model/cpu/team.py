"""Threads that help with long work: awake while a step computes, asleep when the cores are others' to use.

A pool that sleeps between products wakes up later than most of them take, and one that spins for good takes the core
that the expert shards need. So helpers spin for a moment after each product, and the model sends them to sleep before
it sends rows away. Work is taken in chunks by whoever comes first: a helper that comes late costs nothing.

`control` holds 64-bit words: NEXT (ticket · 2**32 + first panel not taken yet), TOTAL panels, DONE panels, RESTS
(helpers should sleep), and the product's arguments. A chunk is taken by a compare-and-swap of NEXT, which succeeds
only while the arguments read before it are those of the same ticket: none ends before all that was taken is done.
Work of another kind, TASKS of a compiled function, is handed over in Python and shared out in the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from model.cpu.panels import PANEL, multiply_panels
from model.cpu.vectors import I64, address_of

NUM_WORDS = 14 * 8  # a cache line for each of these
NEXT, TOTAL, DONE, RESTS, TASKS, TASKS_DONE = range(0, 6 * 8, 8)
X, ROWS, INPUTS, PANELS, IS_BF16, OUT, STRIDE, CHUNK = range(6 * 8, NUM_WORDS, 8)
LOW = (1 << 32) - 1
MAX_SPINS = 60_000  # looks for work, about a quarter of a millisecond
CHUNKS_PER_THREAD = 4


def _word(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(builder.bitcast(data, I64.as_pointer()), [args[1]])


@intrinsic
def _load(_: Any, control: Any, place: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature, args), "seq_cst", 8)

    return types.int64(control, types.intp), generate


@intrinsic
def _store(_: Any, control: Any, place: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _word(context, builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(control, types.intp, types.int64), generate


@intrinsic
def _add(_: Any, control: Any, place: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word(context, builder, signature, args), args[2], "seq_cst")

    return types.int64(control, types.intp, types.int64), generate


@intrinsic
def _swap(_: Any, control: Any, place: Any, old: Any, new: Any) -> Any:
    """Puts `new` where `old` is; says whether it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = _word(context, builder, signature, args)
        pair = builder.cmpxchg(word, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(control, types.intp, types.int64, types.int64), generate


@njit(nogil=True, error_model="numpy", inline="never")
def _take_chunk(control: Any) -> Any:
    """Computes one chunk of the product at hand; False where there is none to take."""
    taken = _load(control, NEXT)
    first, total, chunk = taken & LOW, control[TOTAL], control[CHUNK]
    if first >= total:
        return False
    x, panels, out = address_of(control[X]), address_of(control[PANELS]), address_of(control[OUT])
    rows, inputs, is_bf16, stride = control[ROWS], control[INPUTS], control[IS_BF16] != 0, control[STRIDE]
    last = min(first + chunk, total)
    if _swap(control, NEXT, taken, taken - first + last):
        multiply_panels(x, rows, inputs, panels, is_bf16, out, stride, first, last)
        _add(control, DONE, last - first)
    return True


@njit(nogil=True, error_model="numpy", cache=True)
def _help(control: Any, max_spins: Any) -> None:
    spins = 0
    while spins < max_spins and _load(control, RESTS) == 0:
        spins = 0 if _take_chunk(control) else spins + 1


@njit(nogil=True, error_model="numpy", cache=True)
def _lead(control: Any, ticket: Any, total: Any) -> None:
    control[TOTAL] = total
    _store(control, DONE, 0)
    _store(control, RESTS, 0)
    _store(control, NEXT, ticket << 32)
    while _take_chunk(control):
        pass
    while _load(control, DONE) < total:
        pass
    _store(control, NEXT, ticket << 32 | LOW)  # closed: the next product's arguments may be written


@njit(nogil=True, error_model="numpy", inline="never")
def take_task(control: Any, ticket: Any, num_tasks: Any) -> Any:
    """The next task of this ticket, or -1 where none is left; whoever takes one says `task_done` after it."""
    while True:
        taken = _load(control, TASKS)
        task = taken & LOW
        if taken >> 32 != ticket or task >= num_tasks:
            return -1
        if _swap(control, TASKS, taken, taken + 1):
            return task


@njit(nogil=True, error_model="numpy", inline="never")
def task_done(control: Any) -> None:
    _add(control, TASKS_DONE, 1)


@njit(nogil=True, error_model="numpy", cache=True)
def _wait_for_tasks(control: Any, num_tasks: Any) -> None:
    while _load(control, TASKS_DONE) < num_tasks:
        pass


Tasks = Callable[..., None]  # (control, ticket, num_tasks, *args): takes tasks and does them until none is left


class Team:
    """The helpers of one process; one product or one set of tasks at a time."""

    def __init__(self) -> None:
        self._control = np.zeros(NUM_WORDS, np.int64)
        self._control[NEXT] = LOW
        self._alone = threading.Lock()
        self._wake = threading.Condition()
        self._num_asleep = 0
        self._helpers: list[threading.Thread] = []
        self._ticket = 0
        self._job: tuple[int, Tasks, tuple[Any, ...]] | None = None

    def multiply(
        self,
        x: int,
        num_rows: int,
        num_inputs: int,
        panels: int,
        is_bf16: bool,
        out: int,
        num_outputs: int,
        num_threads: int,
    ) -> bool:
        """out = x · panels, all three by address; False where another thread has the helpers: nothing is done then."""
        if not self._alone.acquire(blocking=False):
            return False
        try:
            self._hire(num_threads - 1)
            control, num_panels = self._control, num_outputs // PANEL
            chunk = max(1, num_panels // (CHUNKS_PER_THREAD * num_threads))
            control[X::8] = (x, num_rows, num_inputs, panels, is_bf16, out, num_outputs, chunk)
            self._ticket += 1
            control[RESTS] = 0
            self._wake_up()
            _lead(control, self._ticket, num_panels)
        finally:
            self._alone.release()
        return True

    def run(self, tasks: Tasks, num_tasks: int, num_threads: int, *args: Any) -> None:
        """Does `num_tasks` tasks that may be done side by side, with helpers where `num_threads` is more than 1."""
        if num_threads == 1 or not self._alone.acquire(blocking=False):
            tasks(np.zeros(NUM_WORDS, np.int64), 0, num_tasks, *args)
            return
        try:
            self._hire(num_threads - 1)
            self._ticket += 1
            control = self._control
            control[TASKS_DONE] = 0
            control[TASKS] = self._ticket << 32
            self._job = (self._ticket, tasks, (num_tasks, *args))
            control[RESTS] = 1  # out of the loop that looks for products
            self._wake_up()
            tasks(control, self._ticket, num_tasks, *args)
            _wait_for_tasks(control, num_tasks)
            self._job, control[RESTS] = None, 0
        finally:
            self._alone.release()

    def rest(self) -> None:
        """Lets the helpers sleep until the next product."""
        self._control[RESTS] = 1

    def _hire(self, count: int) -> None:
        while len(self._helpers) < count:
            helper = threading.Thread(target=self._run, name=f"cpu-helper-{len(self._helpers)}", daemon=True)
            self._helpers.append(helper)
            helper.start()

    def _wake_up(self) -> None:
        if self._num_asleep:
            with self._wake:
                self._wake.notify_all()

    def _run(self) -> None:
        last = 0
        while True:
            _help(self._control, MAX_SPINS)
            job = self._job
            if job is not None and job[0] != last:
                last, tasks, args = job
                tasks(self._control, last, *args)
                continue
            with self._wake:
                self._num_asleep += 1
                self._wake.wait()
                self._num_asleep -= 1


TEAM = Team()
