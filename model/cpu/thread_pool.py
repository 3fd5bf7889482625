"""The `ThreadPool` shares long work among worker threads, which spin during a step and sleep between steps.

If workers slept between products, most products would end before a worker is awake. If workers spun all the time, the
workers would take the cores that expert shards on the same machine need. Therefore workers spin for a moment after each
product, and a caller that sends rows to expert shards pauses the pool until the sums are back. Work is divided into
chunks, and each free thread takes the next chunk, so a worker that wakes up late delays no other thread.

Every product and every set of tasks has a number, the ticket. `control` is an array of 64-bit words that all threads
share:

- NEXT holds the current product's ticket (upper 32 bits) and the first panel that no thread has taken (lower 32 bits).
- TOTAL is the number of the product's panels, and DONE is the number of computed panels.
- A thread reads NEXT and the product's arguments, and then takes a chunk by a compare-and-swap of NEXT. The swap fails
  if a new product has started meanwhile, because NEXT then has another ticket. A product ends only after all taken
  chunks are done, so the arguments of a taken chunk stay valid.
- While PAUSED is set, workers sleep.
- TASKS holds the ticket and the first task that no thread has taken, in the same way as NEXT. A task is an independent
  part of a job, and a job is a compiled function that Python code posts.
- The caller that has LOCK uses the workers; any other caller meanwhile computes its work alone.
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

from model.cpu.panel_products import multiply_panels
from model.cpu.panel_tiles import PANEL
from model.cpu.vectors import I64

log = logging.getLogger(__name__)

MAX_WORKERS = 127
LAST_TICKET = 2**31 - 1  # after this ticket, tickets start at 1 again, because NEXT has 32 bits for a ticket
NEXT, TOTAL, DONE, PAUSED, JOB, TASKS, TASKS_DONE = range(0, 7 * 8, 8)  # each word has its own cache line (8 words)
X, ROWS, INPUTS, PRODUCT, PANELS, SCALES, OUT, STRIDE, CHUNK = range(7 * 8, 7 * 8 + 9)
LOCK, TICKET, NUM_WORKERS, SCRATCH, FAILED = range(9 * 8, 14 * 8, 8)
ASLEEP = 14 * 8  # first worker's flag: 1 if the worker sleeps; each worker has a cache line
PIPE = ASLEEP + 8 * MAX_WORKERS  # both ends of the first worker's pipe, through which a byte wakes the worker
NUM_WORDS = PIPE + 8 * MAX_WORKERS
LOW = (1 << 32) - 1
MAX_SPINS = 60_000  # number of checks for work before a worker sleeps: about a quarter of a millisecond
CHUNKS_PER_THREAD = 4
MIN_WORK_TO_SHARE = 1 << 17  # weights · rows / 4; sharing a smaller product costs more than sharing saves


def _system_call(name: str) -> Any:
    """Return a compiled function that calls the system's `read` or `write` for one byte.

    A thread that waits in the compiled function does not hold Python's lock and does not need the lock to wake up.
    """

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
def _load(_: Any, control: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature, args), "seq_cst", 8)

    return types.int64(control, types.intp), generate


@intrinsic
def _store(_: Any, control: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _word(context, builder, signature, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(control, types.intp, types.int64), generate


@intrinsic
def _add(_: Any, control: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word(context, builder, signature, args), args[2], "seq_cst")

    return types.int64(control, types.intp, types.int64), generate


@intrinsic
def _compare_and_swap(_: Any, control: Any, index: Any, old: Any, new: Any) -> Any:
    """Replace word `index` of `control`, if it equals `old`, by `new` in one atomic step; return True if replaced."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = _word(context, builder, signature, args)
        pair = builder.cmpxchg(word, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(control, types.intp, types.int64, types.int64), generate


@njit(nogil=True, error_model="numpy", inline="never")
def _take_chunk(control: Any) -> Any:
    """Try to take and compute the next chunk of the current product; return False if no chunk is left."""
    taken = _load(control, NEXT)
    first, total, chunk = taken & LOW, control[TOTAL], control[CHUNK]
    if first >= total:
        return False
    product, x, rows, inputs = control[PRODUCT], control[X], control[ROWS], control[INPUTS]
    panels, scales, out, stride = control[PANELS], control[SCALES], control[OUT], control[STRIDE]
    last = min(first + chunk, total)
    if _compare_and_swap(control, NEXT, taken, taken - first + last):
        multiply_panels(product, x, rows, inputs, panels, scales, out, stride, first, last)
        _add(control, DONE, last - first)
    return True


@njit(nogil=True, error_model="numpy", cache=True)
def _run_products(control: Any, worker: Any, last_job: Any) -> None:
    """Compute chunks of products until a job with a higher number than `last_job` is posted.

    A worker that finds no chunk for MAX_SPINS checks, or finds PAUSED set, sleeps until a byte comes through its pipe.
    """
    spins = 0
    while _load(control, JOB) <= last_job:
        if spins < MAX_SPINS and _load(control, PAUSED) == 0:
            spins = 0 if _take_chunk(control) else spins + 1
        else:
            _store(control, ASLEEP + 8 * worker, 1)
            _read(control[PIPE + 8 * worker], control[SCRATCH])
            spins = 0


@njit(nogil=True, error_model="numpy", inline="never", cache=True)
def _wake_workers(control: Any) -> None:
    for worker in range(control[NUM_WORKERS]):
        if _load(control, ASLEEP + 8 * worker) != 0:
            _store(control, ASLEEP + 8 * worker, 0)
            _write(control[PIPE + 8 * worker + 1], control[SCRATCH])


@njit(nogil=True, error_model="numpy", inline="never")
def _share_product(control: Any, total: Any) -> None:
    ticket = control[TICKET] % LAST_TICKET + 1
    control[TICKET] = ticket
    control[TOTAL] = total
    _store(control, DONE, 0)
    _store(control, NEXT, ticket << 32)
    _wake_workers(control)
    while _take_chunk(control):
        pass
    while _load(control, DONE) < total:
        pass
    _store(control, NEXT, ticket << 32 | LOW)  # no thread can take a chunk now, so new arguments may be set


@njit(nogil=True, error_model="numpy", inline="never")
def parallel_product(control: Any, num_threads: Any, x: Any, num_rows: Any, weight: Any, out: Any) -> None:
    """Compute out = x · weight, shared with the workers if the product is long and the workers are free.

    `x` and `out` are addresses, and `weight` is a `PackedMatrixDescriptor`. A row of `out` has `weight.padded_outputs`
    numbers.
    """
    num_inputs, stride = weight.num_inputs, weight.padded_outputs
    num_panels = stride // PANEL
    is_long = num_threads > 1 and num_inputs * stride * max(1, num_rows // 4) >= MIN_WORK_TO_SHARE
    if not is_long or _load(control, PAUSED) != 0 or not _compare_and_swap(control, LOCK, 0, 1):
        multiply_panels(
            weight.product, x, num_rows, num_inputs, weight.panels, weight.scales, out, stride, 0, num_panels
        )
        return
    control[X], control[ROWS], control[INPUTS], control[OUT], control[STRIDE] = x, num_rows, num_inputs, out, stride
    control[PRODUCT], control[PANELS], control[SCALES] = weight.product, weight.panels, weight.scales
    control[CHUNK] = max(1, num_panels // (CHUNKS_PER_THREAD * num_threads))
    _share_product(control, num_panels)
    _store(control, LOCK, 0)


@njit(nogil=True, error_model="numpy", cache=True)
def _try_lock(control: Any) -> Any:
    return _load(control, PAUSED) == 0 and _compare_and_swap(control, LOCK, 0, 1)


@njit(nogil=True, error_model="numpy", inline="never")
def take_task(control: Any, ticket: Any, num_tasks: Any) -> Any:
    """Take the next task of the set `ticket` and return the task's number, or -1 if no task is left.

    The caller must call `task_done` after each task.
    """
    while True:
        taken = _load(control, TASKS)
        task = taken & LOW
        if taken >> 32 != ticket or task >= num_tasks:
            return -1
        if _compare_and_swap(control, TASKS, taken, taken + 1):
            return task


@njit(nogil=True, error_model="numpy", inline="never")
def task_done(control: Any) -> None:
    _add(control, TASKS_DONE, 1)


@njit(nogil=True, error_model="numpy", cache=True)
def _wait_for_tasks(control: Any, num_tasks: Any) -> None:
    while _load(control, TASKS_DONE) < num_tasks and _load(control, FAILED) == 0:
        pass


Tasks = Callable[..., None]  # (control, ticket, num_tasks, *args); takes and computes tasks until no task is left


class ThreadPool:
    """The `ThreadPool` owns a process's worker threads, which share one product or one set of tasks at a time."""

    def __init__(self) -> None:
        self._control = np.zeros(NUM_WORDS, np.int64)
        self._control[NEXT] = LOW
        self._control[SCRATCH] = self._control[SCRATCH + 1 :].ctypes.data
        self._start_lock = threading.Lock()
        self._num_workers = 0
        self._is_busy: list[bool] = []  # for each worker, True while the worker computes tasks
        self._is_paused = False
        self._ticket = self._job_number = 0
        self._job: tuple[int, Tasks, tuple[Any, ...]] = (0, _no_tasks, ())

    def start_workers(self, num_threads: int) -> NDArray[np.int64]:
        """Start missing workers, up to `num_threads` - 1 workers, and return `control` for `parallel_product`."""
        if self._num_workers < (count := min(num_threads - 1, MAX_WORKERS)):
            self._start(count)
        return self._control

    def run(self, tasks: Tasks, num_tasks: int, num_threads: int, *args: Any) -> None:
        """Compute `num_tasks` independent tasks, shared with the workers if `num_threads` is more than 1.

        `tasks` is the compiled function that takes and computes tasks, and `args` are its last arguments. Raises the
        exception of a task that fails in the caller's thread, or RuntimeError if a task fails in a worker.
        """
        control = self.start_workers(num_threads)
        if num_threads == 1 or not _try_lock(control):
            tasks(np.zeros(NUM_WORDS, np.int64), 0, num_tasks, *args)
            return
        try:
            self._job_number += 1
            self._ticket = self._ticket % LAST_TICKET + 1
            control[TASKS_DONE] = control[FAILED] = 0
            control[TASKS] = self._ticket << 32
            self._job = (self._job_number, tasks, (self._ticket, num_tasks, *args))
            control[JOB] = self._job_number
            _wake_workers(control)
            tasks(control, self._ticket, num_tasks, *args)
            _wait_for_tasks(control, num_tasks)
            if control[FAILED]:
                raise RuntimeError("A worker failed in the middle of a task; the log has its exception.")
        except BaseException:
            control[TASKS] = self._ticket << 32 | LOW  # no thread can take a further task
            while any(self._is_busy):  # a running task writes to arrays that the next job may use
                time.sleep(0)
            raise
        finally:
            self._job = (self._job_number, _no_tasks, ())  # frees the arguments even if a worker is late
            control[LOCK] = 0

    def pause(self) -> None:
        """Let the workers sleep until `resume`; until then, callers compute products and tasks alone."""
        self._is_paused = True
        self._control[PAUSED] = 1

    def resume(self) -> None:
        """End a pause; the workers wake up when a caller posts the next product or tasks."""
        if self._is_paused:
            self._is_paused = False
            self._control[PAUSED] = 0

    def _start(self, count: int) -> None:
        with self._start_lock:
            while self._num_workers < count:
                number = self._num_workers
                self._is_busy.append(False)
                self._control[PIPE + 8 * number : PIPE + 8 * number + 2] = os.pipe()
                name = f"cpu-worker-{number}"
                threading.Thread(target=self._work, args=(number,), name=name, daemon=True).start()
                self._num_workers = self._control[NUM_WORKERS] = number + 1

    def _work(self, number: int) -> None:
        last = 0
        while True:
            _run_products(self._control, number, last)
            self._is_busy[number] = True  # set before the job is read, so that `run` waits for this worker
            last, tasks, args = self._job
            try:
                tasks(self._control, *args)
            except Exception:
                log.exception("Worker %d of the CPU thread pool failed.", number)
                self._control[FAILED] = 1
            finally:
                self._is_busy[number] = False


def _no_tasks(*_: Any) -> None:
    """Do nothing; the function is the job of a pool in which no tasks are posted."""


THREAD_POOL = ThreadPool()
