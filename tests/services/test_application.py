"""These tests use the whole application as a user would: one `expertmesh up` with three shards serves all tests.

The order of the tests matters: some of the last tests kill parts of the application, and the very last test stops the
application.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.load_store import LoadStore
from cluster.control.registry import connect
from model.families.registry import load_family
from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.expert import control_client
from tests.cluster.recent_windows import recent_windows
from tests.services.application import STOP_TIMEOUT_S, Application, expertmesh, free_port, inference, wait_until
from tests.services.demo import MODEL, held_out_prompts, load_tokenizer, text_of, transformers_greedy
from tests.services.processes import command_of, descendants, wait_until_gone

pytestmark = pytest.mark.serial

NUM_SHARDS = 3
SERVICE = "expertmesh.inference.v1.Inference"
ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def server() -> Iterator[Application]:
    with Application(NUM_SHARDS, "--allowed-origins", ORIGIN, "--limit", "stop_strings=5") as application:
        print(f"ready after {application.wait_until_ready():.1f} s")
        yield application


@pytest.fixture
def stub(server: Application) -> Iterator[Any]:
    with server.channel() as channel:
        yield inference(channel)


def complete(server: Application, prompt: str | list[int], max_tokens: int, **options: Any) -> str:
    """Request a greedy completion over REST and return its text."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
    response = server.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def stream_text(server: Application, prompt: list[int], max_tokens: int) -> str:
    """Request a streamed greedy completion of exactly `max_tokens` tokens over REST, and return its text."""
    options: Any = {"max_tokens": max_tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with server.openai() as client:
        chunks = list(client.completions.create(model="demo", prompt=prompt, stream=True, **options))
    assert chunks[-1].choices[0].finish_reason == "length"
    return "".join(chunk.choices[0].text for chunk in chunks)


def greedy_request(prompt: Sequence[int], max_tokens: int, ignore_eos: bool = False) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=ignore_eos)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


def stream_tokens(
    stub: Any, request: pb.GenerateRequest, after: int = 0, act: Callable[[], None] | None = None
) -> list[int]:
    """Send `request` as a gRPC stream, and return the token ids of the answer.

    `act` is called once, when at least `after` token ids have arrived.
    """
    token_ids: list[int] = []
    for chunk in stub.GenerateStream(request, timeout=90):
        token_ids += chunk.choice.token_ids
        if act and len(token_ids) >= after:
            act()
            act = None
    return token_ids


def shards_by_id(server: Application) -> dict[str, Any]:
    return {shard["id"]: shard for shard in server.status()["shards"]}


def shard_pid(endpoint: str) -> int:
    return asyncio.run(control_client.status(endpoint)).pid


# The APIs -------------------------------------------------------------------------------------------------------------


def test_the_openai_client_works_unchanged(server: Application) -> None:
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        whole = client.completions.create(model="demo", prompt="import os\n", max_tokens=8, temperature=0)
        assert whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == len(load_tokenizer().encode("import os\n"))
        assert whole.usage.completion_tokens <= 8
        chunks = list(
            client.completions.create(
                model="demo",
                prompt="import os\n",
                max_tokens=8,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage


def test_chats_are_answered_whole_and_streamed(server: Application) -> None:
    question: Any = [{"role": "user", "content": "Write a function."}]
    options: Any = {"model": "demo", "messages": question, "max_tokens": 12, "temperature": 0}
    with server.openai() as client:
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(stream=True, **options))
    assert whole.choices[0].message.content == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason


def test_options_reach_the_gateway(server: Application) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    refused = server.post("/v1/completions", json={"prompt": "a", "stop": list("abcdef")})
    assert refused.json()["error"]["message"] == "stop must hold at most 5 strings, not 6."


def test_grpc_speaks_the_standard_services_and_ours(server: Application, stub: Any) -> None:
    [model] = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.id, model.max_model_len) == ("demo", load_family(MODEL).config.max_position_embeddings)
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == 1  # SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {SERVICE, "grpc.health.v1.Health"} <= set(services)


def test_all_surfaces_give_the_same_tokens(server: Application, stub: Any) -> None:
    [prompt] = held_out_prompts(1)
    whole = stub.Generate(greedy_request(prompt, 24, ignore_eos=True))
    token_ids = list(whole.choices[0].token_ids)
    assert len(token_ids) == whole.usage.completion_tokens == 24
    assert stream_tokens(stub, greedy_request(prompt, 24, ignore_eos=True)) == token_ids
    assert complete(server, prompt, 24, ignore_eos=True) == stream_text(server, prompt, 24) == text_of(token_ids)


def test_sampling_repeats_with_the_seed_and_only_then(server: Application) -> None:
    texts = [complete(server, "class ", 16, temperature=1.0, seed=seed, ignore_eos=True) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# The computed tokens --------------------------------------------------------------------------------------------------


def test_twenty_held_out_prompts_give_the_tokens_of_transformers(server: Application, stub: Any) -> None:
    prompts = held_out_prompts(20)
    expected = transformers_greedy(prompts, 64)
    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(lambda prompt: complete(server, prompt, 64), prompts))
        token_ids = list(pool.map(lambda prompt: stream_tokens(stub, greedy_request(prompt, 64)), prompts))
    assert token_ids == expected
    assert texts == [text_of(ids) for ids in expected]


def test_eight_streams_at_once_equal_each_alone(server: Application) -> None:
    prompts = [prompt[: 8 * n] for n, prompt in enumerate(held_out_prompts(8), 1)]
    alone = [stream_text(server, prompt, 24) for prompt in prompts]
    num_steps = server.status()["engine"]["num_steps"]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: stream_text(server, prompt, 24), prompts)) == alone
    time.sleep(1.0)  # the gateway reads the status of the backbone at most twice a second
    assert server.status()["engine"]["num_steps"] - num_steps < 8 * 24 / 2, "the streams were not computed together"


def test_the_shards_are_processes_of_their_own(server: Application) -> None:
    status = server.status()
    pids = {shard_pid(shard["endpoint"]) for shard in status["shards"]}
    print(f"backbone {status['pid']}, shards {sorted(pids)}")
    assert len(pids) == NUM_SHARDS
    assert {status["pid"], *pids} <= descendants(server.process.pid).keys()
    assert status["pid"] not in pids


def test_what_goes_over_the_wire_is_latent_sized(server: Application) -> None:
    time.sleep(1.0)
    before = server.status()["traffic"]
    complete(server, [5], 128, ignore_eos=True)
    time.sleep(1.0)
    after = server.status()["traffic"]
    rows, picks, copies, sent, received, sent_bytes, received_bytes = (
        after[key] - before[key]
        for key in (
            *("num_rows", "num_picks", "num_rows_sent", "num_sent"),
            *("num_received", "sent_bytes", "received_bytes"),
        )
    )
    config = load_family(MODEL).config
    latent, wider = config.moe_latent_size, config.hidden_size - config.moe_latent_size
    assert latent
    assert 0.9 * sent <= received <= sent  # a stalled machine may lose a message
    ours = (sent_bytes + received_bytes) / rows
    # The bytes per row if rows of the full hidden width were sent.
    of_hidden = ours + 2 * 4 * wider * copies / rows
    of_one_pick = (sent_bytes + received_bytes - 12 * picks) / copies + 12  # the pick itself takes 12 bytes
    per_pick = of_one_pick * picks / rows
    print(
        f"per token and MoE layer: {ours:.0f} bytes in {sent / rows:.2f} messages ({sent_bytes / rows:.0f} there, "
        f"{received_bytes / rows:.0f} back); hidden-sized {of_hidden:.0f}; one message per pick {per_pick:.0f}"
    )
    assert copies / rows <= NUM_SHARDS
    assert sent_bytes / copies < 4 * latent + 128
    assert received_bytes / copies < 4 * latent + 64
    assert ours < per_pick
    assert 2 * ours < of_hidden


def test_expert_load_reaches_the_store(server: Application) -> None:
    shape = load_family(MODEL).expert_shapes[0]

    async def count() -> int:
        redis = connect(server.redis[1])
        store = LoadStore(redis, "demo")
        counts_WE = await store.read(shape.layer, shape.num_experts, recent_windows(store, time.time()))
        await redis.aclose()
        return int(counts_WE.sum())

    assert wait_until(lambda: asyncio.run(count()) > 0, 10)  # the backbone's warm-up prompt is counted
    before = asyncio.run(count())
    complete(server, [5, 6, 7], 8, ignore_eos=True)
    # The picks of rejected drafts count too, because the shards have computed these picks.
    assert wait_until(lambda: asyncio.run(count()) >= before + (3 + 7) * shape.top_k, 10)
    assert asyncio.run(count()) % shape.top_k == 0


# Commands -------------------------------------------------------------------------------------------------------------


def test_status_is_a_table_or_json(server: Application) -> None:
    table = expertmesh("status", "--url", server.url)
    assert table.returncode == 0, table.stderr
    assert "demo: ready" in table.stdout
    assert "Expert shards" in table.stdout
    assert sum("experts-cpu-" in line and line.rstrip().endswith("live") for line in table.stdout.splitlines()) == 3
    report = json.loads(expertmesh("status", "--url", server.url, "--json").stdout)
    assert (report["model"], report["cover"], len(report["shards"])) == ("demo", 2, NUM_SHARDS)


def ask_admin(server: Application, *arguments: str) -> Any:
    """Run an operator command and return the JSON that it prints."""
    answer = expertmesh(*arguments, "--url", server.url, "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def test_the_expert_tier_is_told_in_health_and_metrics(server: Application) -> None:
    health = httpx.get(f"{server.url}/health/degraded", timeout=10)
    report = health.json()
    assert (health.status_code, report["status"], report["experts_below_cover"]) == (200, "covered", 0)
    assert len(report["blast_radius"]) == NUM_SHARDS
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    for name in ("experts_below_cover", "blast_radius", "placement_age_seconds", "balancedness", "hot_expert_layer"):
        assert f"\nexpertmesh:{name}{{" in text
    status = server.status()
    assert status["leader"]
    assert [(pool["name"], pool["num_shards"]) for pool in status["pools"]] == [("experts-cpu", NUM_SHARDS)]
    assert {shard["circuit"] for shard in status["shards"]} == {"closed"}


def test_the_load_names_the_experts_that_are_picked(server: Application) -> None:
    complete(server, [5, 6, 7], 8, ignore_eos=True)
    shape = load_family(MODEL).expert_shapes[0]
    whole = ask_admin(server, "load", "--all")
    assert len(whole["layers"][str(shape.layer)]) == shape.num_experts
    experts = ask_admin(server, "load", "--top", "5")["experts"]
    assert len(experts) == 5
    assert all(len(one["homes"]) >= 2 for one in experts)
    table = expertmesh("load", "--url", server.url)
    assert "Most picked in" in table.stdout


def test_a_plan_is_printed_and_carried_out(server: Application) -> None:
    planned = expertmesh("plan", "--dry-run", "--url", server.url)
    assert planned.returncode == 0, planned.stderr
    assert "Cover (fewest live homes of an expert): 2 now, 2 then." in planned.stdout
    ordered = ask_admin(server, "plan")["order"]

    def is_done() -> bool:
        decisions = ask_admin(server, "decisions")["decisions"]
        return any(one.get("ordered_by") == ordered["by"] for one in decisions)

    assert wait_until(is_done, 20)
    assert not server.status()["orders"]


def test_a_recorded_trace_is_replayed_through_the_planner(server: Application) -> None:
    [recording] = ask_admin(server, "trace", "start")["backbones"]
    complete(server, [5, 6, 7], 16, ignore_eos=True)
    [recorded] = ask_admin(server, "trace", "stop")["backbones"]
    assert recorded["path"] == recording["path"]
    assert recorded["num_calls"] > 0 == recorded["num_dropped"]
    plan = ask_admin(server, "plan", "--trace", recorded["path"])
    assert 0 < plan["balancedness"]["before"] <= plan["balancedness"]["after"] + 0.05
    assert f"{recorded['num_calls']} calls of " in plan["text"]
    os.unlink(recorded["path"])


def test_a_shard_is_drained_and_used_again(server: Application) -> None:
    for prompt in held_out_prompts(8):  # without load no expert would get a third home, on the drained shard
        complete(server, prompt, 32, ignore_eos=True)
    shard_id = min(shards_by_id(server))
    assert ask_admin(server, "drain", shard_id)["order"]["subject"] == shard_id
    assert wait_until(lambda: shard_id not in shards_by_id(server), 30), server.status()
    assert server.status()["tier"]["experts_below_cover"] == 0
    assert [order["subject"] for order in server.status()["orders"]] == [shard_id]
    assert ask_admin(server, "drain", shard_id, "--undo") == {"lifted": True}
    is_back = lambda: shards_by_id(server).get(shard_id, {}).get("state") == "live"  # noqa: E731
    assert wait_until(is_back, 30), server.status()


def test_the_wrong_key_and_an_unknown_shard_are_one_sentence(server: Application) -> None:
    answer = expertmesh("drain", "nobody", "--url", server.url)
    assert answer.returncode == 2
    assert "There is no shard 'nobody'; there are " in answer.stderr
    answer = expertmesh("rebalance", "--url", server.url, "--admin-key", "guess")
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert "/admin/rebalance answered 401: The admin API needs the header" in answer.stderr


def test_chat_answers(server: Application) -> None:
    answer = expertmesh("chat", "Write a class.", "--url", server.url, "--max-tokens", "12", "--temperature", "0")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    assert not answer.stderr


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_of_another_server_is_one_sentence(server: Application, option: str) -> None:
    port = server.port if option == "--port" else server.grpc_port
    ports = {"--port": free_port(), "--grpc-port": free_port(), option: port}
    answer = expertmesh("up", *(str(word) for pair in ports.items() for word in pair), "--model", str(MODEL))
    assert answer.returncode == 2
    assert answer.stderr == (
        f"expertmesh: {option} {port} is in use; choose another port or stop the process that uses it\n"
    )


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("completions", {"json": {"prompt": [5] * 5000}}, 400, "This model's maximum context length is "),
        ("completions", {"content": '{"prompt": '}, 400, "The body is not valid JSON: "),
        ("completions", {"json": {"prompt": "a", "tempreature": 1}}, 400, "Unknown field 'tempreature'; "),
        ("completions", {"json": {"prompt": "a", "max_tokens": -2}}, 400, "max_tokens must be at least 1, not -2."),
        ("completions", {"json": {"prompt": [10**9]}}, 400, "prompt"),
        ("chat/completions", {"json": {"messages": []}}, 400, "messages must hold at least one message."),
        ("completions", {"content": b" " * 10_000_000}, 413, "The body must be at most 4194304 bytes long"),
        ("completions", {"json": {"model": "gpt", "prompt": "a"}}, 404, "The model 'gpt' does not exist; "),
        ("complete", {"json": {}}, 404, ""),
    ],
)
def test_a_bad_request_is_answered_in_one_sentence(
    path: str, body: dict[str, Any], status: int, sentence: str, server: Application
) -> None:
    response = server.post(f"/v1/{path}", **body)
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert message.startswith(sentence)
    assert "\n" not in message
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        (greedy_request([5], -2), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens must be at least 1, not -2."),
        (greedy_request([5] * 5000, 1), grpc.StatusCode.INVALID_ARGUMENT, "This model's maximum context length is "),
        (pb.GenerateRequest(model="gpt", text="a"), grpc.StatusCode.NOT_FOUND, "The model 'gpt' does not exist; "),
    ],
)
def test_a_bad_call_is_answered_in_one_sentence(
    request_: pb.GenerateRequest, code: grpc.StatusCode, sentence: str, stub: Any
) -> None:
    for call in (stub.Generate, lambda request: list(stub.GenerateStream(request))):
        with pytest.raises(grpc.RpcError) as raised:
            call(request_)
        error: Any = raised.value
        assert (error.code(), error.details().startswith(sentence)) == (code, True), error.details()
        assert "\n" not in error.details()


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_answer(server: Application) -> tuple[pb.GenerateRequest, list[int]]:
    """Return a request whose answer takes a few seconds, and the tokens of an answer during which no process failed."""
    request = greedy_request(held_out_prompts(1)[0], 200, ignore_eos=True)
    with server.channel() as channel:
        return request, stream_tokens(inference(channel), request)


def test_a_shard_that_is_killed_costs_no_token_and_comes_back(
    server: Application, stub: Any, long_answer: tuple[pb.GenerateRequest, list[int]]
) -> None:
    request, expected = long_answer
    before = shards_by_id(server)
    victim = before[min(before)]
    pid = shard_pid(victim["endpoint"])
    assert stream_tokens(stub, request, 20, lambda: os.kill(pid, signal.SIGKILL)) == expected
    assert not command_of(pid)
    killed_at = time.monotonic()

    def is_back() -> bool:
        """Return True if a new shard has replaced the killed shard, all shards hold experts, and the cover is full."""
        status = server.status()
        after = {shard["id"]: shard for shard in status["shards"]}
        is_replaced = len(after) == len(before) and len(after.keys() - before.keys()) == 1 and victim["id"] not in after
        return is_replaced and status["cover"] >= 2 and all(shard["num_held"] for shard in after.values())

    assert wait_until(is_back, 60), server.status()
    print(f"refilled {time.monotonic() - killed_at:.0f} s after the stream's end")
    assert stream_tokens(stub, request) == expected


def test_a_drill_kills_a_shard_under_load_and_nobody_notices(server: Application) -> None:
    before = shards_by_id(server)
    arguments = ["--kill", "shard", "--under-load", "--rate", "1", "--seconds", "12", "--max-tokens", "16"]
    answer = expertmesh("drill", *arguments, "--url", server.url, "--json", timeout_s=240)
    print(answer.stdout)
    report = json.loads(answer.stdout)
    assert report["shard"] in before
    assert report["num_requests"] > 3
    assert (report["num_failed"], report["num_different"]) == (0, 0)
    assert 0 < report["full_cover_s"] < 60
    assert answer.returncode == (0 if report["is_unnoticed"] else 1)
    assert wait_until(lambda: len(shards_by_id(server)) == NUM_SHARDS, 60), server.status()


def test_without_the_store_it_serves_on(
    server: Application, stub: Any, long_answer: tuple[pb.GenerateRequest, list[int]]
) -> None:
    request, expected = long_answer
    pid, url = server.redis
    assert stream_tokens(stub, request, 20, lambda: os.kill(pid, signal.SIGKILL)) == expected
    assert not command_of(pid), f"{url} still runs"
    assert stream_tokens(stub, request) == expected
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    assert expertmesh("status", "--url", server.url).returncode == 0


# The end --------------------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_everything_it_started_and_nothing_else(server: Application) -> None:
    started = descendants(server.process.pid)
    assert sum("experts-cpu" in command for command in started.values()) == NUM_SHARDS
    with EmbeddedRedis() as other_store, subprocess.Popen(["sleep", "300"]) as other:
        server.press_ctrl_c()
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert not wait_until_gone(started, 10)
        assert command_of(other_store.pid)
        assert other.poll() is None
        other.kill()
    assert server.output.rstrip().endswith("Stopped.")
    assert "Traceback" not in server.output
