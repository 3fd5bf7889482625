"""Threads that help with long work: awake while a step computes, asleep when the cores are others' to use.

A pool that sleeps between products wakes up later than most of them take, and one that spins for good takes the core
that expert shards on the same machine need. So helpers spin for a moment after each product, and whoever sends rows to
such shards sends the helpers to sleep until the sums are back. Work is taken in chunks by whoever comes first: a
helper that comes late costs nothing.

`control` holds 64-bit words: NEXT (ticket · 2**32 + first panel not taken yet), TOTAL panels, DONE panels, RESTS
(helpers should sleep), and the product's arguments. A chunk is taken by a compare-and-swap of NEXT, which succeeds
only while the arguments read before it are those of the same ticket: none ends before all that was taken is done.
Work of another kind, TASKS of a compiled function, is handed over in Python and shared out in the same way.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from model.cpu.panels import PANEL, multiply_panels
from model.cpu.vectors import I64, address_of

MAX_HELPERS = 127
LAST_TICKET = 2**31 - 1  # then they begin anew: 32 bits hold a ticket
NEXT, TOTAL, DONE, RESTS, JOB, TASKS, TASKS_DONE = range(0, 7 * 8, 8)  # a cache line for each
X, ROWS, INPUTS, PANELS, IS_BF16, OUT, STRIDE, CHUNK = range(7 * 8, 15 * 8, 8)
ASLEEP = 15 * 8  # and one for each helper
NUM_WORDS = ASLEEP + 8 * MAX_HELPERS
LOW = (1 << 32) - 1
MAX_SPINS = 60_000  # looks for work, about a quarter of a millisecond
CHUNKS_PER_THREAD = 4


_read: Any = ctypes.CDLL(None).read  # called without Python's lock: whoever sleeps on it wakes without asking for that
_read.argtypes, _read.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_ssize_t


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


@njit(nogil=True, error_model="numpy")
def _help(control: Any, asleep: Any, pipe: Any, byte: Any, last_ticket: Any) -> None:
    """Helps with products until a job other than `last_ticket` is posted; sleeps on the pipe when there is nothing."""
    spins = 0
    while _load(control, JOB) <= last_ticket:
        if spins < MAX_SPINS and _load(control, RESTS) == 0:
            spins = 0 if _take_chunk(control) else spins + 1
        else:
            _store(control, asleep, 1)
            _read(pipe, byte.ctypes, 1)
            spins = 0


@njit(nogil=True, error_model="numpy", cache=True)
def _lead(control: Any, ticket: Any, total: Any) -> None:
    control[TOTAL] = total
    _store(control, DONE, 0)
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
        self._pipes: list[int] = []  # one for each helper: a byte written to it wakes it up
        self._is_resting = False
        self._ticket = self._job_number = 0
        self._job: tuple[int, Tasks, tuple[Any, ...]] = (0, _no_tasks, ())

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
        if self._is_resting or not self._alone.acquire(blocking=False):
            return False
        try:
            self._hire(num_threads - 1)
            control, num_panels = self._control, num_outputs // PANEL
            chunk = max(1, num_panels // (CHUNKS_PER_THREAD * num_threads))
            control[X:ASLEEP:8] = (x, num_rows, num_inputs, panels, is_bf16, out, num_outputs, chunk)
            self._ticket = self._ticket % LAST_TICKET + 1
            self._wake_up()
            _lead(control, self._ticket, num_panels)
        finally:
            self._alone.release()
        return True

    def run(self, tasks: Tasks, num_tasks: int, num_threads: int, *args: Any) -> None:
        """Does `num_tasks` tasks that may be done side by side, with helpers where `num_threads` is more than 1."""
        if num_threads == 1 or self._is_resting or not self._alone.acquire(blocking=False):
            tasks(np.zeros(NUM_WORDS, np.int64), 0, num_tasks, *args)
            return
        try:
            self._hire(num_threads - 1)
            self._job_number += 1
            self._ticket = self._ticket % LAST_TICKET + 1
            control = self._control
            control[TASKS_DONE] = 0
            control[TASKS] = self._ticket << 32
            self._job = (self._job_number, tasks, (self._ticket, num_tasks, *args))
            control[JOB] = self._job_number
            self._wake_up()
            tasks(control, self._ticket, num_tasks, *args)
            _wait_for_tasks(control, num_tasks)
            self._job = (self._job_number, _no_tasks, ())  # a helper that comes late holds nothing
        finally:
            self._alone.release()

    def rest(self) -> None:
        """Sends the helpers to sleep: until `resume`, the caller works alone."""
        self._is_resting = True
        self._control[RESTS] = 1

    def resume(self) -> None:
        if self._is_resting:
            self._is_resting = False
            self._control[RESTS] = 0
            self._wake_up()

    def _hire(self, count: int) -> None:
        while len(self._pipes) < count:
            pipe, to_wake = os.pipe()
            number = len(self._pipes)
            assert number < MAX_HELPERS
            self._pipes.append(to_wake)
            name = f"cpu-helper-{number}"
            threading.Thread(target=self._help_out, args=(pipe, ASLEEP + 8 * number), name=name, daemon=True).start()

    def _wake_up(self) -> None:
        for number, pipe in enumerate(self._pipes):
            if self._control[ASLEEP + 8 * number]:
                self._control[ASLEEP + 8 * number] = 0
                os.write(pipe, b"!")

    def _help_out(self, pipe: int, asleep: int) -> None:
        last, byte = 0, np.zeros(1, np.int8)
        while True:
            _help(self._control, asleep, pipe, byte, last)
            last, tasks, args = self._job
            tasks(self._control, *args)


def _no_tasks(*_: Any) -> None:
    """Before there was a job."""


TEAM = Team()
