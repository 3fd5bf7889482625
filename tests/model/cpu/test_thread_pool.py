"""The tests check that workers change no result, sleep while the thread pool is paused, and wake up afterwards."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.blocks.attention import Attention
from model.blocks.mamba import Mamba2Mixer
from model.blocks.norm import RMSNorm
from model.configs.mixer_shapes import AttentionShape, MambaShape
from model.configs.state_spec import StateSpec
from model.configs.weight_format import FORMATS, WeightFormat
from model.cpu.linear import linear
from model.cpu.packed_matrix import PackedMatrix, pack_matrix
from model.cpu.thread_pool import LAST_TICKET, THREAD_POOL, TICKET
from model.state import Batch, State
from model.stored_matrix import StoredMatrix
from tests.model.steps import seeded
from tests.model.stored_matrices import random_matrix

pytestmark = pytest.mark.serial

NUM_ROUNDS = 300
WIDTH = 256
LENS, CONTEXTS, TABLE_LEN = (30, 1, 7, 200), (5, 0, 40, 0), 20


@pytest.fixture(params=[2, 4], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    """Return a function that sets torch's number of threads.

    The argument 0 means one thread. Any other argument means as many threads as the fixture's parameter says.
    """
    before = torch.get_num_threads()
    yield lambda count: torch.set_num_threads(request.param if count else 1)
    torch.set_num_threads(before)


def packed(weight: Tensor) -> PackedMatrix:
    return pack_matrix(StoredMatrix.plain(weight))


@pytest.mark.parametrize(
    ("format", "dtype"), [*((format, torch.bfloat16) for format in FORMATS), ("plain", torch.float32)], ids=str
)
def test_products_keep_their_bits(threads: Callable[[int], None], format: WeightFormat, dtype: torch.dtype) -> None:
    randn, sizes = seeded(0), ((700, 256), (4000, 64), (96, 2048))
    weights = [pack_matrix(random_matrix(format, *size).to("cpu", dtype)) for size in sizes]
    products = [(weight, randn(rows, weight.num_inputs)) for weight in weights for rows in (1, 5, 40)]
    threads(0)
    alone = [linear(x, weight) for weight, x in products]
    threads(1)
    for _ in range(NUM_ROUNDS // 10):
        for (weight, x), expected in zip(products, alone, strict=True):
            assert torch.equal(linear(x, weight), expected)


def batch() -> Batch:
    num_requests = len(LENS)
    tables = tuple(tuple(range(r, TABLE_LEN * num_requests, num_requests)) for r in range(num_requests))
    return Batch(torch.zeros(sum(LENS), dtype=torch.long), LENS, CONTEXTS, tuple(range(num_requests)), tables)


def random_state(spec: StateSpec, dtype: torch.dtype) -> State:
    state, randn = State(spec, len(LENS), TABLE_LEN * len(LENS), dtype), seeded(1)
    for tensor in [*state.pages.values(), *(t for tensors in state.slots.values() for t in tensors)]:
        tensor.copy_(randn(*tensor.shape))
    return state


def run(module: Any, spec: StateSpec, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    state = random_state(spec, dtype)
    x = seeded(2)(sum(LENS), WIDTH)
    module.add_to(x, batch(), state)
    return x, [*state.pages.values(), *(t for tensors in state.slots.values() for t in tensors)]


def randomly_filled(module: Any, dtype: torch.dtype) -> Any:
    randn = seeded(3)
    for parameter in module.parameters():
        parameter.data = (randn(*parameter.shape) / parameter.shape[-1] ** 0.5).to(dtype)
    module.requires_grad_(False).pack(RMSNorm(WIDTH, 1e-5), dtype)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_keep_their_bits(threads: Callable[[int], None], dtype: torch.dtype) -> None:
    shape = MambaShape(WIDTH, 16, 64, 4, 128, 4, 128)
    mamba = randomly_filled(Mamba2Mixer(shape, 0, 1e-5), dtype), StateSpec((), (shape.state_spec(0),))
    heads = AttentionShape(WIDTH, 16, 2, 64)
    attention = randomly_filled(Attention(heads, 0), dtype), StateSpec((heads.state_spec(0),), ())
    for module, spec in (mamba, attention):
        threads(0)
        out, state = run(module, spec, dtype)
        threads(1)
        for _ in range(10):
            found, after = run(module, spec, dtype)
            assert torch.equal(found, out)
            assert all(torch.equal(one, other) for one, other in zip(after, state, strict=True))


def test_two_callers_do_not_wait_for_each_other(threads: Callable[[int], None]) -> None:
    """Check that three simultaneous callers get right results: one uses the workers, and the others work alone."""
    weight, x = packed(seeded(0)(4000, 512)), seeded(1)(3, 512)
    threads(0)
    expected, wrong = linear(x, weight), list[int]()
    threads(1)

    def call() -> None:
        wrong.extend(i for i in range(NUM_ROUNDS) if not torch.equal(linear(x, weight), expected))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def busy_s() -> float:
    """Return the workers' processor time in seconds."""
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("cpu-worker")]
    assert workers
    stats = [Path(f"/proc/self/task/{worker.native_id}/stat").read_text() for worker in workers]
    return sum(sum(map(int, stat.rsplit(")", 1)[1].split()[11:13])) for stat in stats) / os.sysconf("SC_CLK_TCK")


def test_workers_sleep_while_others_need_the_cores(threads: Callable[[int], None]) -> None:
    weight, x = packed(seeded(0)(4000, 512)), seeded(1)(3, 512)
    threads(1)
    expected = linear(x, weight)
    stop_at, before = time.monotonic() + 60, busy_s()
    while busy_s() < before + 0.05:
        assert time.monotonic() < stop_at, "the workers do nothing"
        linear(x, weight)
    THREAD_POOL.pause()
    assert torch.equal(linear(x, weight), expected)  # while the pool is paused, without workers
    time.sleep(0.05)
    before = busy_s()
    time.sleep(0.5)
    assert busy_s() - before < 0.05  # a worker that spins uses 0.5 s of an idle core
    THREAD_POOL.resume()
    assert torch.equal(linear(x, weight), expected)


def test_a_worker_that_fails_is_reported_and_works_on(threads: Callable[[int], None]) -> None:
    """Check that a failure in a worker raises an error in the caller, which would otherwise wait forever."""
    weight, x = packed(seeded(0)(4000, 512)), seeded(1)(3, 512)
    threads(0)
    expected = linear(x, weight)

    def tasks(control: Any, ticket: int, num_tasks: int) -> None:
        if threading.current_thread().name.startswith("cpu-worker"):
            raise ValueError("planted")

    threads(1)
    with pytest.raises(RuntimeError, match="A worker failed in the middle of a task"):
        THREAD_POOL.run(tasks, 2, torch.get_num_threads())
    assert all(torch.equal(linear(x, weight), expected) for _ in range(10))


def test_a_task_under_way_is_waited_for_when_another_fails(threads: Callable[[int], None]) -> None:
    """Check that a job with a failed task waits until all running tasks of the job have ended.

    A running task may write to arrays that the next job uses, and would be counted as a task of the next job.
    """
    threads(1)
    has_begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def tasks(control: Any, ticket: int, num_tasks: int) -> None:
        if threading.current_thread().name.startswith("cpu-worker"):
            has_begun.set()
            assert may_end.wait(60)
            time.sleep(0.1)
            ended.set()
        else:
            assert has_begun.wait(60)
            may_end.set()
            raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        THREAD_POOL.run(tasks, 2, torch.get_num_threads())
    assert ended.is_set()


def test_tickets_begin_anew(threads: Callable[[int], None]) -> None:
    weight, x = packed(seeded(0)(4000, 512)), seeded(1)(3, 512)
    threads(0)
    expected = linear(x, weight)
    threads(1)
    linear(x, weight)
    THREAD_POOL.start_workers(1)[TICKET] = LAST_TICKET - 3
    assert all(torch.equal(linear(x, weight), expected) for _ in range(10))
