"""Threads that help with long work: awake while a step computes, asleep when the cores are others' to use.

A pool that sleeps between products wakes up later than most of them take, and one that spins for good takes the core
that expert shards on the same machine need. So helpers spin for a moment after each product, and whoever sends rows to
such shards sends the helpers to sleep until the sums are back. Work is taken in chunks by whoever comes first: a
helper that comes late costs nothing.

`control` holds 64-bit words: NEXT (ticket · 2**32 + first panel not taken yet), TOTAL panels, DONE panels, RESTS
(helpers should sleep), and the product's arguments. A chunk is taken by a compare-and-swap of NEXT, which succeeds
only while the arguments read before it are those of the same ticket: none ends before all that was taken is done.
Work of another kind, TASKS of a compiled function, is handed over in Python and shared out in the same way. Who has the
helpers is the one that has LED; whoever comes meanwhile works alone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from model.cpu.packed_matrix import PANEL, multiply_panels
from model.cpu.vectors import I64, address_of

log = logging.getLogger(__name__)

MAX_HELPERS = 127
LAST_TICKET = 2**31 - 1  # then they begin anew: 32 bits hold a ticket
NEXT, TOTAL, DONE, RESTS, JOB, TASKS, TASKS_DONE = range(0, 7 * 8, 8)  # a cache line for each
X, ROWS, INPUTS, PANELS, IS_BF16, OUT, STRIDE, CHUNK = range(7 * 8, 8 * 8)
LED, TICKET, HELPERS, SPARE, FAILED = range(8 * 8, 13 * 8, 8)
ASLEEP = 13 * 8  # and one for each helper
PIPE = ASLEEP + 8 * MAX_HELPERS  # a byte written to it wakes a helper up; and one for each
NUM_WORDS = PIPE + 8 * MAX_HELPERS
LOW = (1 << 32) - 1
MAX_SPINS = 60_000  # looks for work, about a quarter of a millisecond
CHUNKS_PER_THREAD = 4
MIN_WORK_TO_SHARE = 1 << 16  # words of weights, times quarters of rows, below which help costs more than it brings


def _system_call(name: str) -> Any:
    """Compiles `read` or `write` of one byte. Whoever sleeps in it wakes up without asking for Python's lock."""

    @intrinsic
    def call(_: Any, file: Any, byte: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            pointer, word, size = ir.IntType(8).as_pointer(), ir.IntType(32), I64
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(size, [word, pointer, size]), name
            )
            file = builder.trunc(args[0], word)
            return builder.call(function, [file, builder.inttoptr(args[1], pointer), ir.Constant(size, 1)])

        return types.int64(types.int64, types.int64), generate

    return call


_read, _write = _system_call("read"), _system_call("write")


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
def _help(control: Any, helper: Any, last_job: Any) -> None:
    """Helps with products until a job other than `last_job` is posted; sleeps on the pipe when there is nothing."""
    spins = 0
    while _load(control, JOB) <= last_job:
        if spins < MAX_SPINS and _load(control, RESTS) == 0:
            spins = 0 if _take_chunk(control) else spins + 1
        else:
            _store(control, ASLEEP + 8 * helper, 1)
            _read(control[PIPE + 8 * helper], control[SPARE])
            spins = 0


@njit(nogil=True, error_model="numpy", inline="never", cache=True)
def _wake_up(control: Any) -> None:
    for helper in range(control[HELPERS]):
        if _load(control, ASLEEP + 8 * helper) != 0:
            _store(control, ASLEEP + 8 * helper, 0)
            _write(control[PIPE + 8 * helper + 1], control[SPARE])


@njit(nogil=True, error_model="numpy", inline="never")
def _lead(control: Any, total: Any) -> None:
    ticket = control[TICKET] % LAST_TICKET + 1
    control[TICKET] = ticket
    control[TOTAL] = total
    _store(control, DONE, 0)
    _store(control, NEXT, ticket << 32)
    _wake_up(control)
    while _take_chunk(control):
        pass
    while _load(control, DONE) < total:
        pass
    _store(control, NEXT, ticket << 32 | LOW)  # closed: the next product's arguments may be written


@njit(nogil=True, error_model="numpy", inline="never")
def product(
    control: Any,
    num_threads: Any,
    x: Any,
    num_rows: Any,
    num_inputs: Any,
    panels: Any,
    is_bf16: Any,
    out: Any,
    num_outputs: Any,
) -> None:
    """out = x · panels, all three by address; with help where it is long enough and nobody else has the helpers."""
    num_panels, words = num_outputs // PANEL, num_inputs * num_outputs // (2 if is_bf16 else 1)
    is_long = num_threads > 1 and words * max(1, num_rows // 4) >= MIN_WORK_TO_SHARE
    if not is_long or _load(control, RESTS) != 0 or not _swap(control, LED, 0, 1):
        multiply_panels(
            address_of(x),
            num_rows,
            num_inputs,
            address_of(panels),
            is_bf16,
            address_of(out),
            num_outputs,
            0,
            num_panels,
        )
        return
    control[X], control[ROWS], control[INPUTS], control[PANELS] = x, num_rows, num_inputs, panels
    control[IS_BF16], control[OUT], control[STRIDE] = is_bf16, out, num_outputs
    control[CHUNK] = max(1, num_panels // (CHUNKS_PER_THREAD * num_threads))
    _lead(control, num_panels)
    _store(control, LED, 0)


@njit(nogil=True, error_model="numpy", cache=True)
def _take_lead(control: Any) -> Any:
    return _load(control, RESTS) == 0 and _swap(control, LED, 0, 1)


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
    while _load(control, TASKS_DONE) < num_tasks and _load(control, FAILED) == 0:
        pass


Tasks = Callable[..., None]  # (control, ticket, num_tasks, *args): takes tasks and does them until none is left


class ThreadPool:
    """The helpers of one process; one product or one set of tasks at a time."""

    def __init__(self) -> None:
        self._control = np.zeros(NUM_WORDS, np.int64)
        self._control[NEXT] = LOW
        self._control[SPARE] = self._control[SPARE + 1 :].ctypes.data
        self._hiring = threading.Lock()
        self._num_helpers = 0
        self._is_busy: list[bool] = []  # each helper, with tasks
        self._is_resting = False
        self._ticket = self._job_number = 0
        self._job: tuple[int, Tasks, tuple[Any, ...]] = (0, _no_tasks, ())

    def ready(self, num_threads: int) -> NDArray[np.int64]:
        """What `product` needs, with helpers for so many threads."""
        if self._num_helpers < (count := min(num_threads - 1, MAX_HELPERS)):
            self._hire(count)
        return self._control

    def run(self, tasks: Tasks, num_tasks: int, num_threads: int, *args: Any) -> None:
        """Does `num_tasks` tasks that may be done side by side, with helpers where `num_threads` is more than 1.

        Raises what a task raised here, RuntimeError where it was raised in a helper.
        """
        control = self.ready(num_threads)
        if num_threads == 1 or not _take_lead(control):
            tasks(np.zeros(NUM_WORDS, np.int64), 0, num_tasks, *args)
            return
        try:
            self._job_number += 1
            self._ticket = self._ticket % LAST_TICKET + 1
            control[TASKS_DONE] = control[FAILED] = 0
            control[TASKS] = self._ticket << 32
            self._job = (self._job_number, tasks, (self._ticket, num_tasks, *args))
            control[JOB] = self._job_number
            _wake_up(control)
            tasks(control, self._ticket, num_tasks, *args)
            _wait_for_tasks(control, num_tasks)
            if control[FAILED]:
                raise RuntimeError("A helper failed in the middle of a task; the log says how.")
        except BaseException:
            control[TASKS] = self._ticket << 32 | LOW  # no more are taken, and those that were are waited for:
            while any(self._is_busy):  # they write to what the next job may be given
                time.sleep(0)
            raise
        finally:
            self._job = (self._job_number, _no_tasks, ())  # a helper that comes late holds nothing
            control[LED] = 0

    def rest(self) -> None:
        """Sends the helpers to sleep: until `resume`, the caller works alone."""
        self._is_resting = True
        self._control[RESTS] = 1

    def resume(self) -> None:
        """They wake up with the next work."""
        if self._is_resting:
            self._is_resting = False
            self._control[RESTS] = 0

    def _hire(self, count: int) -> None:
        with self._hiring:
            while self._num_helpers < count:
                number = self._num_helpers
                self._is_busy.append(False)
                self._control[PIPE + 8 * number : PIPE + 8 * number + 2] = os.pipe()
                name = f"cpu-helper-{number}"
                threading.Thread(target=self._help_out, args=(number,), name=name, daemon=True).start()
                self._num_helpers = self._control[HELPERS] = number + 1

    def _help_out(self, number: int) -> None:
        last = 0
        while True:
            _help(self._control, number, last)
            self._is_busy[number] = True  # before it is known with what, or it might be overlooked
            last, tasks, args = self._job
            try:
                tasks(self._control, *args)
            except Exception:
                log.exception("Helper %d failed.", number)
                self._control[FAILED] = 1
            finally:
                self._is_busy[number] = False


def _no_tasks(*_: Any) -> None:
    """Before there was a job."""


THREAD_POOL = ThreadPool()
