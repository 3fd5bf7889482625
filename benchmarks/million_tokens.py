"""The benchmark serves requests of a million tokens, and shows what the product promises at this length.

    python -m benchmarks.million_tokens                                  # about 6 minutes and 8 GB
    python -m benchmarks.million_tokens --tokens 20000 --json out.json

The model has the demo's weights and a larger `max_position_embeddings`. The engine runs in this process, and three
expert shards and a gateway run in processes of their own; there is a real store and a real controller, but no Ray.
`benchmarks.filled_context` writes the state of two long prefixes into the engine, because reading them would take
hours. Each request then really reads the tokens after its prefix. The memory holds little more than the two prefixes.

- memory: the growth of this process's resident memory, compared with the engine's memory plan.
- admission: a prompt that fits is served; a prompt of one token too many is refused with a sentence.
- prefix cache: a request continues a filled prefix, a second one branches off in its last tokens, and a third one
  starts where the second one has left a saved state.
- decode: the time of a token. The tokens are those of the model alone, with the same state.
- waiting: a request with the other prefix does not fit beside a running one, and starts when that one has ended.
- preemption: the same with a higher priority. The preempted request continues from its saved state.
- REST: a prompt of token ids passes the gateway, whose event loop must go on meanwhile.
- recovery: a shard is killed while a request is decoded.

The exit code is 1 if a check fails. Times are no checks.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.filled_context import FIRST_ORDINARY_ID, FilledContext, Reference, fill
from benchmarks.gateway_pair import Served, run_gateway, served
from benchmarks.long_context import long_model
from benchmarks.server import free_port, new_client, resident_bytes
from cluster.control.embedded_redis import EmbeddedRedis
from model.demo import DEMO
from model.families.registry import load_family
from model.family import ModelFamily
from services.args import DEFAULT_STATE_MEMORY, AppArgs
from services.cli.drill.load import ask
from services.controller.controller import Controller, ControllerConfig
from services.engine.backbone import Backbone
from services.engine.backbone_config import BackboneConfig
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenOutput
from services.engine.engine import Engine
from services.engine.scheduling.memory import MemoryPlan
from services.engine.server import EngineServer
from services.expert.shard import ExpertShard, ShardConfig

NUM_SHARDS, NUM_HOMES = 3, 2
CONTEXT_SHARE = 2**20 / 1e6  # the model's context, divided by the tokens of a prompt
NUM_READ = 128  # tokens of a prompt that the engine really reads
NUM_BRANCH = 64  # tokens of the prompt that branches off
MAX_REQUESTS = 4
SMALL_LEN = 4096  # context of the engine that runs before the memory is measured first
MIN_PLANNED = 1 << 30  # bytes; the working memory of a step is no small share of a smaller plan
MEMORY_BAR = 0.05  # largest difference between the growth of the memory and the plan, as a share of the plan
TIMEOUT_S = 900.0  # of a request; a request that had to read its whole prompt would take hours
KILL_AFTER = 4  # tokens of an answer after which a shard is killed
LATER = 8  # priority number of a request that others may preempt


@dataclass
class Answer:
    """An `Answer` collects the tokens of a request, and the monotonic time at which each part of them arrived."""

    token_ids: list[int]
    times: list[float]
    num_cached: int = 0
    reason: str = ""

    @property
    def token_ms(self) -> float:
        """Return the mean time between two tokens after the first output."""
        return 1e3 * (self.times[-1] - self.times[1]) / max(1, len(self.token_ids) - 1)

    @property
    def first_s(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def longest_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.times[1:], self.times[2:], strict=False))


async def generate(
    engine: Engine,
    name: str,
    token_ids: Sequence[int],
    num_tokens: int,
    priority: int = 0,
    note: Callable[[int], None] = lambda _: None,
) -> Answer:
    """Generate greedily; `note` is called with the number of tokens after each output."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, priority=priority)
    answer = Answer([], [time.monotonic()])
    async for output in engine.generate(name, token_ids, params, TIMEOUT_S):
        answer.times.append(time.monotonic())
        _add(answer, output)
        note(len(answer.token_ids))
    return answer


def _add(answer: Answer, output: TokenOutput) -> None:
    answer.token_ids += output.token_ids
    answer.num_cached, answer.reason = output.num_cached, output.cache_reason


# The server -----------------------------------------------------------------------------------------------------------


def run_shard(pipe: Connection, args: AppArgs, name: str) -> None:
    """Serve one expert shard until the other end of `pipe` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the benchmark, which then closes the pipe
    torch.set_num_threads(1)
    family, pool = load_family(args.model), args.pools[0]

    async def run() -> None:
        config = ShardConfig(name, args.shard_memory(pool, family), move_timeout_s=0)
        shard = ExpertShard(config, family, args.registry())
        await shard.start()
        pipe.send(name)
        await asyncio.to_thread(pipe.poll, None)
        await shard.stop()

    asyncio.run(run())


@asynccontextmanager
async def fleet(args: AppArgs, family: ModelFamily) -> AsyncIterator[list[Served]]:
    """Run NUM_SHARDS shards and a controller during the block, or none if the experts are local."""
    if args.experts == "local":
        yield []
        return
    with ExitStack() as stack:
        names = [f"{args.pools[0].name}-{i}" for i in range(NUM_SHARDS)]
        shards = await asyncio.gather(
            *(asyncio.to_thread(stack.enter_context, served(run_shard, args, name)) for name in names)
        )
        config = ControllerConfig(args.num_shards, family.checkpoint.digest, args.torch_dtype)
        controller = asyncio.create_task(Controller(config, family.expert_shapes, args.registry(), args.loads()).run())
        try:
            yield list(shards)
        finally:
            controller.cancel()
            await asyncio.gather(controller, return_exceptions=True)


@asynccontextmanager
async def backbone(args: AppArgs, family: ModelFamily, context: int, memory: MemoryPlan) -> AsyncIterator[Backbone]:
    config = BackboneConfig(
        dtype=args.torch_dtype,
        device="cpu",
        max_model_len=context,
        max_batch_tokens=args.max_batch_tokens,
        memory=memory,
        num_threads=args.threads(family),
    )
    stores = (None, None) if args.experts == "local" else (args.registry(), args.loads())
    running = Backbone(config, family, *stores)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()


def memory_for(args: AppArgs, family: ModelFamily, num_blocks: int) -> MemoryPlan:
    """Return a plan with `num_blocks` KV pages, and slots for MAX_REQUESTS requests and their saved states."""
    spec, longest = family.config.state_spec, args.context(family)
    ample = 4 * (spec.num_blocks(longest) * spec.bytes_per_block(args.torch_dtype) + DEFAULT_STATE_MEMORY)
    plan = args.model_copy(update={"state_memory": ample}).memory_plan(family)
    num_more = num_blocks - plan.num_blocks
    return replace(plan, num_blocks=num_blocks, nbytes=plan.nbytes + num_more * plan.bytes_per_block)


# Checks ---------------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A `Trial` runs the checks one after another, and collects `results` and the names of `failed` checks."""

    engine: Engine
    contexts: tuple[FilledContext, FilledContext]
    tails: tuple[list[int], list[int]]
    expected: tuple[list[int], list[int]]
    results: dict[str, Any]
    failed: list[str]

    @property
    def num_tokens(self) -> int:
        return len(self.expected[0])

    def prompt(self, i: int) -> list[int]:
        return self.contexts[i].token_ids + self.tails[i]

    def note(self, name: str, result: Any) -> None:
        """Keep and print a result."""
        self.results[name] = result
        print(f"{name}: {_shown(result)}", file=sys.stderr, flush=True)

    def check(self, name: str, is_good: bool) -> None:
        if not is_good:
            self.failed.append(name)

    async def ask(self, i: int, name: str, **options: Any) -> Answer:
        """Ask for the answer to prompt `i`, and check its tokens."""
        answer = await generate(self.engine, name, self.prompt(i), self.num_tokens, **options)
        self.check(f"{name}: tokens", answer.token_ids == self.expected[i])
        return answer

    async def admission(self) -> None:
        longest = self.engine.scheduler.config.max_model_len
        try:
            await generate(self.engine, "too long", [FIRST_ORDINARY_ID] * longest, 1)
            self.check("admission: too long a prompt", False)
        except ValueError as error:
            self.note("refusal", str(error))

    async def prefix_cache(self) -> None:
        """Ask for the first prompt; then for a branch of it twice, which must start at its branching point at last."""
        first = await self.ask(0, "decode")
        self.note("decode", {"first_s": first.first_s, "token_ms": first.token_ms, "num_cached": first.num_cached})
        self.check("prefix cache: first", first.num_cached == len(self.contexts[0].token_ids))
        rng, page = random.Random(1), self.engine.scheduler.config.block_size
        ids = sorted(set(self.contexts[0].token_ids))
        found = []
        for i in range(2):
            other = rng.choices(ids, k=NUM_BRANCH)
            answer = await generate(self.engine, f"branch {i}", self.prompt(0) + other, 1)
            found.append({"first_s": answer.first_s, "num_cached": answer.num_cached, "reason": answer.reason})
        self.note("branches", found)
        end = len(self.prompt(0)) // page * page
        self.check("prefix cache: branch", [one["num_cached"] for one in found] == [first.num_cached, end])
        self.note("saved_lens", sorted(c.length for c in self.engine.scheduler.memory.cache.checkpoints))

    async def waiting(self) -> None:
        """Run both prompts, which do not fit together: the second one must wait for the first one."""
        first = asyncio.create_task(self.ask(0, "waiting: first"))
        await self._until_running("waiting: first")
        second = await self.ask(1, "waiting: second")
        ended = (await first).times[-1]
        self.check("waiting: order", second.times[1] > ended)
        self.note("waiting", {"waited_s": second.times[1] - second.times[0], "num_cached": second.num_cached})

    async def preemption(self) -> None:
        """Let the second prompt preempt the first one; the first one must then go on from a saved state."""
        num_before = self.engine.scheduler.num_preemptions
        begun = asyncio.Event()
        first = asyncio.create_task(
            self.ask(0, "preempted", priority=LATER, note=lambda count: begun.set() if count >= KILL_AFTER else None)
        )
        await begun.wait()
        second = await self.ask(1, "preempting")
        answer = await first
        self.check("preemption", self.engine.scheduler.num_preemptions > num_before)
        self.note("preemption", {"first_s": second.first_s, "longest_gap_s": answer.longest_gap_s})

    async def recovery(self, pid: int) -> None:
        """Kill the process `pid`, a shard, while an answer is generated."""
        killed = list[float]()

        def kill(count: int) -> None:
            if count >= KILL_AFTER and not killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(time.monotonic())

        answer = await self.ask(0, "recovery", note=kill)
        gaps = [b - a for a, b in zip(answer.times[1:], answer.times[2:], strict=False)]
        self.note("recovery", {"longest_gap_s": max(gaps), "median_gap_s": statistics.median(gaps)})

    async def rest(self, args: AppArgs) -> None:
        """Send the first prompt through a gateway in another process, and watch the event loops of both processes."""
        server = EngineServer(self.engine, "127.0.0.1")
        args = args.model_copy(update={"http_port": free_port(), "grpc_port": free_port()})
        url, endpoint = f"http://127.0.0.1:{args.http_port}", await server.start()
        with ExitStack() as stack:
            gateway = await asyncio.to_thread(stack.enter_context, served(run_gateway, args, endpoint))
            await _until_ready(url)
            await asyncio.to_thread(gateway.ask)
            body = {"prompt": self.prompt(0), "max_tokens": self.num_tokens, "temperature": 0, "ignore_eos": True}
            outcome = await ask(f"{url}/v1/completions", body, time.perf_counter(), TIMEOUT_S)
            longest_block_s = await asyncio.to_thread(gateway.ask)
            self.check(f"REST: {outcome.error}", not outcome.error)
            self.check("REST: tokens", outcome.num_generated == self.num_tokens)
            prompt = [FIRST_ORDINARY_ID] * self.engine.scheduler.config.max_model_len
            async with new_client(TIMEOUT_S) as client:
                refused = await client.post(f"{url}/v1/completions", json={"prompt": prompt})
            self.check("REST: too long a prompt", refused.status_code == 400)
        await server.stop()
        self.note(
            "rest",
            {
                "body_bytes": len(json.dumps(body)),
                "first_s": outcome.ttft_s,
                "num_cached": outcome.num_cached,
                "longest_block_s": longest_block_s,
                "refusal": refused.json()["error"]["message"],
            },
        )

    async def _until_running(self, name: str) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not any(request.id == name for request in self.engine.scheduler.running):
                await asyncio.sleep(0.01)


async def _until_ready(url: str) -> None:
    async with new_client(TIMEOUT_S) as client, asyncio.timeout(TIMEOUT_S):
        while (await client.get(f"{url}/health/ready")).status_code != 200:
            await asyncio.sleep(0.05)


async def measure(args: AppArgs, num_tokens: int, num_output: int) -> dict[str, Any]:
    """Run all checks with prompts of `num_tokens` tokens and answers of `num_output` tokens; return the results.

    With local experts, leave out the checks that need other processes.
    """
    family = args.check()
    longest, spec, pid = args.context(family), family.config.state_spec, os.getpid()
    torch.set_num_threads(args.threads(family))
    reference = Reference(family, args.torch_dtype, num_tokens + num_output)
    contexts = reference.context(0, num_tokens - NUM_READ), reference.context(1, num_tokens - NUM_READ)
    rng, vocab_size = random.Random(0), family.config.vocab_size
    tails = tuple([rng.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(NUM_READ)] for _ in contexts)
    expected = tuple(reference.answer(*pair, num_output) for pair in zip(contexts, tails, strict=True))
    del reference
    gc.collect()
    # Room for both contexts and for the other tokens of one request, but not of two.
    num_blocks = 2 * spec.num_blocks(num_tokens) - 4
    async with fleet(args, family) as shards:
        # The first engine compiles kernels and loads libraries, which belong to no plan.
        async with backbone(args, family, SMALL_LEN, memory_for(args, family, spec.num_blocks(SMALL_LEN))):
            pass
        gc.collect()
        before = resident_bytes(pid)
        plan = memory_for(args, family, num_blocks)
        async with backbone(args, family, longest, plan) as running:
            trial = Trial(running.engine, contexts, tails, expected, {}, [])
            began = time.monotonic()
            for one in contexts:
                fill(running.engine, one)
            trial.note("fill_s", time.monotonic() - began)
            await trial.admission()
            await trial.prefix_cache()
            await trial.waiting()
            await trial.preemption()
            memory = {"planned_bytes": plan.nbytes, "grown_bytes": resident_bytes(pid) - before}
            trial.note("memory", memory)
            if shards:
                await trial.rest(args)
                await trial.recovery(shards[0].pid)
    return {"num_tokens": num_tokens, "context": longest, **trial.results, "failed": trial.failed}


def report(results: dict[str, Any]) -> Table:
    table = Table(title=f"prompts of {results['num_tokens']:,} tokens, context {results['context']:,}")
    table.add_column("what")
    table.add_column("measured")
    memory = results["memory"]
    ratio = memory["grown_bytes"] / memory["planned_bytes"]
    mib = [f"{memory[key] / 2**20:.0f} MiB" for key in ("grown_bytes", "planned_bytes")]
    table.add_row("memory", f"grew by {mib[0]}; the plan says {mib[1]} ({ratio - 1:+.1%})")
    for name in ("refusal", "decode", "branches", "waiting", "preemption", "rest", "recovery"):
        if name in results:
            table.add_row(name, _shown(results[name]))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check requests of a million tokens.")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with EmbeddedRedis() as store, long_model(asked.model, int(asked.tokens * CONTEXT_SHARE)) as model:
        args = AppArgs(
            model=model, model_name="demo", redis_url=store.url, dtype=asked.dtype, max_requests=MAX_REQUESTS
        )
        results = asyncio.run(measure(args, asked.tokens, asked.output))
    console = Console(width=160)
    console.print(report(results))
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=2) + "\n")
    grown, planned = results["memory"]["grown_bytes"], results["memory"]["planned_bytes"]
    if planned >= MIN_PLANNED and abs(grown - planned) > MEMORY_BAR * planned:
        results["failed"].append("memory")
    if results["failed"]:
        sys.exit(f"These checks failed: {', '.join(results['failed'])}.")


if __name__ == "__main__":
    main()
