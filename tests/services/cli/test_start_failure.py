from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.cli.start_failure import reason_of
from tests.services.application import ENVIRONMENT, ROOT, Application, wait_until

SERVE = "The deployment failed to start 3 times in a row. See controller logs for details. Error:\n"
REPLICA = """\
\x1b[36mray::ServeReplica:expertmesh:backbone.initialize_and_get_metadata()\x1b[39m (pid=14717, ip=192.0.2.2)
  File "/site-packages/ray/serve/_private/replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/site-packages/ray/serve/_private/replica.py", line 4010, in _call_func_or_gen
    result = await result
             ^^^^^^^^^^^^
"""
FRAME = """\
  File "/app/services/app.py", line 147, in __init__
    await self._backbone.start()
    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""
CHAINED = """\
KeyError: 'x'

The above exception was the direct cause of the following exception:

\x1b[36mray::ServeReplica:expertmesh:backbone.initialize_and_get_metadata()\x1b[39m (pid=14717, ip=192.0.2.2)
"""
GROUP = """\
  | ExceptionGroup: several (2 sub-exceptions)
  +-+---------------- 1 ----------------
    | ValueError: the first of the group
    +---------------- 2 ----------------
    | KeyError: 'k'
    +------------------------------------
"""
ALLOCATION = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB."


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (REPLICA + FRAME + "ValueError: the width is 3; allowed is 2.", "the width is 3; allowed is 2"),
        (REPLICA + FRAME + "ValueError: first line.\nsecond line\n  third: line", "first line"),
        (REPLICA + FRAME + "grpc.aio.UsageError: no address", "no address (UsageError)"),
        (REPLICA + FRAME + "OSError: [Errno 28] No space left", "[Errno 28] No space left (OSError)"),
        (REPLICA + FRAME + "AssertionError", "AssertionError"),
        (REPLICA + FRAME + CHAINED + FRAME + "ValueError: the last one", "the last one"),
        (REPLICA.replace("\n  ", "\n  | ") + FRAME + GROUP, "the first of the group"),
        (REPLICA + FRAME + "MemoryError", "it ran out of memory (MemoryError)"),
        (
            REPLICA + FRAME + f"RuntimeError: {ALLOCATION}allocate 70368744177664 bytes. Error code 12",
            "it ran out of memory (it tried to allocate 70368744177664 bytes)",
        ),
        (REPLICA + FRAME + f"torch.OutOfMemoryError: {CUDA}", "it ran out of memory (it tried to allocate 20.00 GiB)"),
        ("ActorDiedError()", "its process was killed, as happens when the machine has too little memory"),
    ],
)
def test_the_reason_is_the_error_that_ended_the_constructor(report: str, reason: str) -> None:
    assert reason_of(SERVE + report) == reason


@pytest.mark.parametrize("message", ["", "Upscaling from 1 to 2 replicas.", "Error:\n"])
def test_a_message_about_something_else_has_no_reason(message: str) -> None:
    assert reason_of(message) is None


# Python runs a `sitecustomize` that it finds on its path at every start. This one makes a method `start` of ours fail.
FAULT = """
import importlib.machinery, sys

class Planted(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name == "{module}" else None
        if spec is not None:
            execute = spec.loader.exec_module
            def plant(module):
                execute(module)
                async def fail(self):
                    {fault}
                module.{name}.start = fail
            spec.loader.exec_module = plant
        return spec

sys.meta_path.insert(0, Planted)
"""


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Serve give up after the first attempt; each further attempt takes as long and ends in the same way."""
    monkeypatch.setitem(ENVIRONMENT, "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT", "1")


def end_of_failed_start(*options: str) -> str:
    """Start the application, check that it ends with exit code 2 and no traceback, and return its last sentence."""
    with Application(1, *options) as application:
        assert wait_until(lambda: application.process.poll() is not None, 270), application.output
        output = application.output
    assert application.process.returncode == 2, output
    assert "Traceback" not in output, output
    assert "RayTaskError" not in output, output
    [last] = [line for line in output.splitlines() if line.startswith("expertmesh: ")]
    sentence, _, logs = last.partition("; the traceback is in ")
    assert any("Traceback" in file.read_text(errors="replace") for file in Path(logs).glob("*.log")), output
    return sentence.removeprefix("expertmesh: ")


@pytest.mark.serial
@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize(
    ("module", "name", "fault", "options", "sentence"),
    [
        (
            "services.expert.shard",
            "ExpertShard",
            "raise ValueError('the planted fault; there is nothing to do')",
            [],
            "a shard of the pool experts-cpu did not start: the planted fault; there is nothing to do",
        ),
        (
            "services.engine.backbone",
            "Backbone",
            "import torch; torch.empty(1 << 50, dtype=torch.uint8)",
            ["--local-experts"],
            "the backbone did not start: it ran out of memory (it tried to allocate 1125899906842624 bytes)",
        ),
        (
            "services.gateway.listener",
            "Listener",
            "raise OSError(98, 'Address already in use')",
            ["--local-experts"],
            "the gateway did not start: [Errno 98] Address already in use (OSError)",
        ),
    ],
    ids=["shard", "backbone", "gateway"],
)
def test_a_replica_that_does_not_start_tells_why(
    module: str,
    name: str,
    fault: str,
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(module=module, name=name, fault=fault))
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert end_of_failed_start(*options) == sentence
