"""The tests serve every checkpoint of `SERVED`, alone and in company, locally and through shards.

No token of an answer and no log probability may depend on the other requests, on chunks, on preemption, on the prefix
cache, on drafts, on the number of shards, on the placement, on a move of experts or on a killed shard. Sampled tokens
must have the probabilities of the model.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.topology import Homes, Placement
from model.families.registry import load_family
from model.family import LanguageModel
from model.state import State
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenLogprob
from services.engine.drafting.draft_depth import DraftingState
from services.engine.drafting.drafter import Drafter, DraftRequest
from services.engine.engine import Engine
from services.engine.runner import Runner
from services.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from services.expert import control_client
from services.expert.client import CallPolicy, RemoteExperts
from services.expert.shard import ExpertShard
from services.expert.weights import transfer
from services.expert.weights.load_order import Key, Sources
from services.expert.weights.weights import ExpertMetadata, Weights
from tests.model.checkpoints import Tiny
from tests.model.steps import full_logits, random_tokens
from tests.model.variants import SERVED
from tests.services.engine.sampling.statistics import chi_squared, chi_squared_bound, obvious_probs
from tests.services.expert.serving import CONFIG, run, serving
from tests.services.expert.shard_process import ShardProcess
from tests.services.expert.test_client import prefer

NUM_PROMPTS, NUM_TOKENS = 32, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "32 together": {},
    "8 together in small chunks": {"num_slots": 8, "max_batch_tokens": 13},
    "preemption and drafts": {"num_blocks": 12, "max_draft_tokens": 3},
    "cache, drafts and chunks": {"has_prefix_cache": True, "max_draft_tokens": 3, "max_batch_tokens": 40},
}
NUM_SAMPLED, SAMPLED_LEN = 1_000, 3  # answers, and tokens of an answer, whose distribution is tested
Answer = tuple[list[int], list[TokenLogprob]]


def make_prompts() -> list[list[int]]:
    """Return prompts of 2 to 64 tokens; every second prompt begins with the same 40 tokens, for the prefix cache."""
    chooser = random.Random(0)
    ends = [random_tokens(chooser.randint(2, 24), seed=n) for n in range(NUM_PROMPTS)]
    return [[*(random_tokens(40, seed=99) if n % 2 else []), *end] for n, end in enumerate(ends)]


def sampling_of(n: int) -> SamplingParams:
    """Return the parameters of prompt `n`: greedy or seeded, in turns of four prompts."""
    params: dict[str, Any] = {"temperature": 0} if n % 4 < 2 else {"temperature": 1.0, "seed": n}
    return SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0, **params)


PROMPTS, SAMPLING = make_prompts(), [sampling_of(n) for n in range(NUM_PROMPTS)]


class Served:
    """A `Served` is a checkpoint, served in one dtype, with the answers that it gives one by one with local experts."""

    def __init__(self, tiny: Tiny, dtype: torch.dtype) -> None:
        self.tiny, self.dtype = tiny, dtype
        self.family = load_family(tiny.path)
        self.local = self.family.load_local_experts(dtype)
        self.model = self.family.load_backbone(self.local, dtype)
        with self.engine() as made:
            self.alone = asyncio.run(ask(made, together=1))

    @contextmanager
    def engine(self, model: LanguageModel | None = None, **limits: Any) -> Iterator[Engine]:
        spec = self.family.config.state_spec
        num_saved = 32 if spec.recurrent else 0  # a model without recurrent state saves no states in slots
        defaults = {"num_slots": 32, "num_checkpoint_slots": num_saved, "num_blocks": 256, "max_draft_tokens": 0}
        sizes = {"bytes_per_slot": spec.bytes_per_slot(self.dtype), "bytes_per_block": spec.bytes_per_block(self.dtype)}
        settings: dict[str, Any] = defaults | sizes | {"has_prefix_cache": False} | limits
        config = SchedulerConfig(block_size=spec.block_size, max_model_len=128, **settings)
        state = State(spec, config.num_slots + config.num_checkpoint_slots, config.num_blocks, self.dtype)
        made = Engine(Runner(model or self.model, state), Scheduler(config), self.family.config.vocab_size, [])
        made.start()
        try:
            yield made
        finally:
            made.stop()

    @asynccontextmanager
    async def shards(self, num_shards: int) -> AsyncIterator[list[ExpertShard]]:
        """Serve shards without experts in this process; their names are s0, s1 and so on."""
        async with AsyncExitStack() as stack:
            configs = [replace(CONFIG, shard_id=f"s{n}", dtype=self.dtype, max_queue=64) for n in range(num_shards)]
            yield [await stack.enter_async_context(serving(self.family, config=config)) for config in configs]

    @contextmanager
    def through(self, remote: RemoteExperts) -> Iterator[Engine]:
        """Run an engine that asks the shards of `remote` for the sums of the routed experts."""
        with self.engine(self.family.load_backbone(remote, self.dtype)) as made:
            yield made
        remote.close()

    def homes(self, choose: Callable[[], tuple[str, ...]]) -> dict[int, Homes]:
        """Return the homes that `choose` returns for each expert."""
        return {shape.layer: tuple(choose() for _ in range(shape.num_experts)) for shape in self.family.expert_shapes}


async def ask(
    made: Engine, turn: str = "", together: int = NUM_PROMPTS, heard: list[int] | None = None
) -> list[Answer]:
    """Return the answers to all prompts, of which at most `together` run at a time; `heard` gets each token at once."""
    gate, heard_tokens = asyncio.Semaphore(together), [] if heard is None else heard

    async def one(n: int) -> Answer:
        tokens, logprobs = list[int](), list[TokenLogprob]()
        async with gate:
            async for output in made.generate(f"{n} {turn}", PROMPTS[n], SAMPLING[n]):
                tokens += output.token_ids
                logprobs += output.logprobs
                heard_tokens.extend(output.token_ids)
        return tokens, logprobs

    return await asyncio.gather(*map(one, range(NUM_PROMPTS)))


async def ask_until(made: Engine, is_over: asyncio.Event, expected: list[Answer], heard: list[int]) -> None:
    """Ask for all answers again and again until `is_over` is set, and check the answers."""
    turn = 0
    while not is_over.is_set():
        turn += 1
        assert await ask(made, str(turn), heard=heard) == expected


async def until_heard(heard: list[int], num_tokens: int) -> None:
    while len(heard) < num_tokens:
        await asyncio.sleep(0.001)


@pytest.fixture(scope="module", params=SERVED, ids=lambda one: f"{one[0]} {one[1]}".replace("torch.", ""))
def served(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Served:
    name, dtype = request.param
    return Served(tiny_of(name), dtype)


@pytest.fixture
def deep_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every engine draft to the largest depth."""

    def depths(self: DraftingState, acceptances: Any, num_other_rows: int, allowed: Any) -> list[int]:
        return [min(self.max_depth, most) for most in allowed]

    monkeypatch.setattr(DraftingState, "depths", depths)


@pytest.fixture
def good_drafts(served: Served, deep_drafts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make three of four drafts right.

    The MTP modules of the tiny checkpoints have random weights, so their own drafts are nearly always wrong.
    """
    draft = Drafter.draft

    def draft_well(self: Drafter, draft_requests: list[DraftRequest]) -> None:
        draft(self, draft_requests)
        for one in draft_requests:
            n = int(one.request.id.split()[0])
            start = one.request.num_tokens + len(one.new_ids) - len(PROMPTS[n])
            right = served.alone[n][0][start : start + len(one.draft_ids)]
            one.draft_ids = tuple(token if (n + start + i) % 4 else (token + 1) % 256 for i, token in enumerate(right))

    monkeypatch.setattr(Drafter, "draft", draft_well)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_changes_a_token_or_its_probability(served: Served, name: str, good_drafts: None) -> None:
    with served.engine(**SETTINGS[name]) as made:
        # The first turn saves states where prompts begin to differ; the second turn reuses these states.
        for turn in range(2 if "cache" in name else 1):
            assert asyncio.run(ask(made, str(turn))) == served.alone
        stats = made.stats()
    assert (stats.num_preemptions > 0) == ("preemption" in name)
    assert (stats.num_cached_tokens > 0) == ("cache" in name)
    num_depths = 3 if "drafts" in name and served.family.has_mtp else 0
    assert len(stats.accepted_by_position) == num_depths
    for accepted, drafted in zip(stats.accepted_by_position, stats.drafted_by_position, strict=True):
        assert 0 < accepted < drafted


def test_no_logprob_of_a_prompt_depends_on_chunks_or_on_other_requests(served: Served) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)

    async def scored(made: Engine, together: int) -> list[tuple[TokenLogprob | None, ...]]:
        gate = asyncio.Semaphore(together)

        async def one(n: int) -> tuple[TokenLogprob | None, ...]:
            async with gate:
                outputs = [output async for output in made.generate(str(n), PROMPTS[n], params)]
            return tuple(entry for output in outputs for entry in output.prompt_logprobs)

        return await asyncio.gather(*map(one, range(8)))

    with served.engine() as made:
        expected = asyncio.run(scored(made, together=1))
    assert [len(entries) for entries in expected] == [len(prompt) for prompt in PROMPTS[:8]]
    with served.engine(max_batch_tokens=40, max_scored_tokens=9) as made:
        assert asyncio.run(scored(made, together=8)) == expected


def answer_probs(served: Served, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Return all possible answers of SAMPLED_LEN tokens, each with its probability according to the model's logits."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(SAMPLED_LEN):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, prob in found.items():
            logits = full_logits(served.model, [*prompt, *tokens])[-1]
            for token, next_prob in enumerate(obvious_probs(logits.tolist(), params)):
                if next_prob > 0:
                    longer[*tokens, token] = prob * float(next_prob)
        found = longer
    return found


async def sample(made: Engine, prompt: list[int], params: SamplingParams) -> list[tuple[int, ...]]:
    """Return the answers to one prompt with the seeds 0, 1, 2 and so on."""
    gate = asyncio.Semaphore(2 * NUM_PROMPTS)

    async def one(seed: int) -> tuple[int, ...]:
        async with gate:
            outputs = made.generate(str(seed), prompt, replace(params, seed=seed))
            return tuple([token async for output in outputs for token in output.token_ids])

    return await asyncio.gather(*map(one, range(NUM_SAMPLED)))


def test_sampled_tokens_have_the_probabilities_of_the_model(
    served: Served, deep_drafts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare many answers to one prompt with the probabilities of all answers, without drafts and with drafts.

    A draft is a guess among the tokens that are possible, so that about every third draft is right.
    """
    if served.tiny.name in ("odd", "qwen_odd"):
        pytest.skip("takes up to a minute, because the recurrence of this checkpoint runs plain PyTorch")
    prompt, chooser, draft = random_tokens(8, seed=8), random.Random(8), Drafter.draft
    params = SamplingParams(temperature=0.5, top_k=3, max_tokens=SAMPLED_LEN, ignore_eos=True)
    probs, possible = answer_probs(served, prompt, params), defaultdict[tuple[int, ...], list[int]](list)
    for answer in probs:
        for n, token in enumerate(answer):
            possible[answer[:n]].append(token)

    def guess(self: Drafter, draft_requests: list[DraftRequest]) -> None:
        draft(self, draft_requests)
        for one in draft_requests:
            tokens = (*one.request.token_ids[len(prompt) :], *one.new_ids)
            guesses = tokens
            for _ in one.draft_ids:
                guesses = (*guesses, chooser.choice(possible[guesses]))
            one.draft_ids = guesses[len(tokens) :]

    with served.engine() as made:
        sampled = asyncio.run(sample(made, prompt, params))
    counts = Counter(sampled)
    assert counts.keys() <= probs.keys()
    found = chi_squared(np.array([counts[answer] for answer in probs]), np.array(list(probs.values())))
    assert found < chi_squared_bound(len(probs))

    if served.family.has_mtp:
        monkeypatch.setattr(Drafter, "draft", guess)
        with served.engine(max_draft_tokens=SAMPLED_LEN - 1) as made:
            assert asyncio.run(sample(made, prompt, params)) == sampled
            stats = made.stats()
        for accepted, drafted in zip(stats.accepted_by_position, stats.drafted_by_position, strict=True):
            assert 0.2 < accepted / drafted < 0.5


def test_no_number_of_shards_and_no_placement_changes_anything(served: Served) -> None:
    async def test() -> None:
        remote, chooser = RemoteExperts(CallPolicy(timeout_s=20.0)), random.Random(served.tiny.name)
        async with served.shards(5) as shards:
            with served.through(remote) as made:
                for num_shards in range(1, 6):
                    used = [shard.record for shard in shards[:num_shards]]
                    ids, num_homes = [shard.id for shard in used], min(num_shards, 1 + num_shards % 2)
                    homes = served.homes(lambda: tuple(chooser.sample(ids, num_homes)))  # noqa: B023
                    placement = await control_client.fill(used, homes, epoch=num_shards)
                    assert placement.gains == served.local.gains
                    remote.update(placement, used)
                    assert await ask(made, str(num_shards)) == served.alone

    run(test)


def test_a_live_move_from_shard_to_shard_changes_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Move all experts of a layer while answers are computed; the new home gets the stored bytes from the old home."""
    remote, heard, sent = RemoteExperts(CallPolicy(timeout_s=20.0)), list[int](), list[Key]()
    layer, num_experts = served.family.expert_shapes[0].layer, served.family.expert_shapes[0].num_experts
    keys = [(layer, expert) for expert in range(num_experts)]

    async def test() -> None:
        async with served.shards(3) as (old, other, new):
            homes = served.homes(lambda: ("s0", "s1"))
            placement = await control_client.fill([old.record, other.record], homes, epoch=1)
            known = {key: metadata.checksum for key in keys if (metadata := old.host.metadata(key))}
            current, is_moved = old.service.source.current, asyncio.Event()

            async def note(key: Key) -> tuple[Weights, ExpertMetadata] | None:
                sent.append(key)
                return await current(key)

            monkeypatch.setattr(transfer, "FETCH_STALL_S", 30.0)  # a machine that stalls makes no fetch fail
            monkeypatch.setattr(old.service.source, "current", note)
            monkeypatch.setattr(new.service.source, "read", lambda *key: pytest.fail("the checkpoint was read"))
            records = [shard.record for shard in (old, other, new)]
            remote.update(placement, records)

            with served.through(remote) as made:
                asking = asyncio.create_task(ask_until(made, is_moved, served.alone, heard))
                for key in keys:
                    await until_heard(heard, len(heard) + 1)  # answers are in progress between the steps of the move
                    sources = Sources({key: old.endpoint}, {key: known[key]})
                    await control_client.load(new.endpoint, {layer: [key[1]]}, 2, sources=sources)
                await until_heard(heard, len(heard) + 1)
                assert sent == keys
                remote.update(Placement(2, homes | {layer: (("s2",),) * num_experts}, placement.gains), records)
                for shard in (old, other):
                    await control_client.unload(shard.endpoint, {layer: list(range(num_experts))}, 2)
                is_moved.set()
                await asking
                num_before = new.service.handler.counters.num_requests
                assert await ask(made, "afterwards") == served.alone
                assert new.service.handler.counters.num_requests > num_before
            held = {key: Weights(new.host.on_device.banks[layer].matrices(key[1])) for key in keys}
            assert {key: weights.checksum for key, weights in held.items()} == known

    run(test)


def test_a_shard_killed_under_load_changes_nothing(served: Served) -> None:
    remote, heard = RemoteExperts(CallPolicy(timeout_s=20.0)), list[int]()

    async def test(process: ShardProcess) -> None:
        async with served.shards(2) as shards:
            records = [*process.shards, *(shard.record for shard in shards)]
            homes = served.homes(lambda: ("p0", "s0", "s1"))
            remote.update(await control_client.fill(records, homes, epoch=1), records)
            with served.through(remote) as made:
                while not all(stream.is_settled for stream in remote.connections.streams):
                    await asyncio.sleep(0.01)
                prefer(remote, "p0")
                is_over = asyncio.Event()
                asking = asyncio.create_task(ask_until(made, is_over, served.alone, heard))
                await until_heard(heard, NUM_PROMPTS)
                assert (await control_client.status(records[0].endpoint)).counters.num_requests > 0
                os.kill(process.process.pid, signal.SIGKILL)
                while not asking.done() and remote.down != {"p0"}:
                    await asyncio.sleep(0.001)
                is_over.set()
                await asking
                assert await ask(made, "afterwards") == served.alone

    with ShardProcess(served.tiny.path, 1, str(served.dtype).removeprefix("torch."), name="p") as process:
        run(lambda: test(process))
