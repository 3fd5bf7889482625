"""These tests read the application's arguments from a Serve config, and check that wrong arguments are refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ray.serve import Application, Deployment
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build_as_serve_does
from ray.serve._private.build_app import build_app as build_app_of_serve
from redis import Redis
from safetensors.torch import load_file

from cluster.control.embedded_redis import EmbeddedRedis
from cluster.control.registry_store import StoreUnavailable
from cluster.topology import Shard
from model.checkpoint import SINGLE
from model.demo import DEMO
from model.demo.quantize import formats_of, write_quantized
from model.encoder import linear_modules
from services.app import build_app
from services.args import AppArgs, PoolArgs
from tests.services.demo import write_served


def test_serve_validates_the_args_of_a_config() -> None:
    assert build_as_serve_does(build_app, {"dtype": "bfloat16", "pools": [{"shards": 5}]})
    with pytest.raises(ValidationError, match="bogus"):
        build_as_serve_does(build_app, {"bogus": 1})


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"model": "/nowhere"}, "the model path /nowhere is not a directory"),
        ({"max_model_len": 10**6}, "max_model_len is 1000000; the model allows up to 4096"),
        ({"state_memory": "1KiB"}, "the state budget is 1,024 bytes"),
        ({"pools": [{"memory_budget": "1MiB"}]}, "the 3 shards have room for"),
        ({"model_name": "a{b}"}, "braces"),
        ({"pools": [{}, {}]}, "each needs a name of its own"),
        ({"pools": [{"device": "cuda", "num_gpus": 0}]}, "num_gpus of pool experts-cpu is 0"),
        ({"device": "cuda", "backbone_gpus": 0}, "backbone_gpus is 0"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_starts(args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_app(AppArgs(**args))


def test_a_model_too_short_for_a_request_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DEMO, path := tmp_path / "model")
    (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 1})
    )
    with pytest.raises(ValueError, match=r"max_position_embeddings = 1; allowed is 2 or more: a request needs a token"):
        AppArgs(model=str(path)).check()


def test_the_planner_keeps_groups_together_only_if_asked() -> None:
    assert not AppArgs().placement.policy.keep_groups
    assert AppArgs.model_validate({"placement": {"keep_groups": True}}).placement.policy.keep_groups
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        AppArgs.model_validate({"placement": {"keep_group": True}})


def test_memory_is_planned_from_the_checkpoint() -> None:
    args = AppArgs(pools=[PoolArgs(shards=4)])
    family = args.check()
    whole = sum(shape.num_experts * shape.nbytes(torch.float32) for shape in family.expert_shapes)
    share = args.shard_memory(args.pools[0], family)
    assert 2 * whole / 3 <= share <= 0.75 * whole  # any three of the four shards can hold two homes of every expert
    assert AppArgs().shard_memory(PoolArgs(), family) == whole
    assert args.num_shards == {"experts-cpu": 4}
    assert args.shard_host_memory(args.pools[0], family) == 0
    assert args.shard_host_memory(PoolArgs(device="cuda"), family) == pytest.approx(1.1 * whole / 4, rel=1e-3)
    assert args.shard_host_memory(PoolArgs(host_budget=7), family) == 7
    assert args.memory_plan(family).nbytes <= 1 << 30


def test_memory_on_gpus_is_planned_for_widened_experts(tmp_path: Path) -> None:
    """Check that the default budgets of quantized experts are larger on a GPU, and that the capacity check sees it."""
    modules = linear_modules(load_file(DEMO / SINGLE))
    write_quantized(DEMO, tmp_path / "quantized", formats_of("nvfp4", modules))
    gpu, cpu = PoolArgs(device="cuda"), PoolArgs()
    args = AppArgs(model=str(tmp_path / "quantized"), device="cuda", pools=[gpu])
    family = args.check()
    stored = args.shard_memory(cpu, family)
    assert stored == sum(shape.num_experts * shape.nbytes(torch.bfloat16) for shape in family.expert_shapes)
    wide = sum(shape.num_experts * shape.num_params * 2 for shape in family.expert_shapes)
    assert args.shard_memory(gpu, family) == wide > 2 * stored
    assert stored / 3 < args.shard_host_memory(gpu, family) < 1.3 * stored / 3
    with pytest.raises(ValueError, match=f"need {wide:,} bytes on devices"):
        args.model_copy(update={"pools": [gpu.model_copy(update={"memory_budget": wide // 4})]}).check()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models/my-model", "my-model"),
        ("hub/models--nvidia--Nemotron-3-Nano/snapshots/0a1b2c3d", "nvidia/Nemotron-3-Nano"),
        ("hub/models--gpt2/snapshots/0a1b2c3d", "gpt2"),
        ("snapshots/0a1b2c3d", "0a1b2c3d"),
    ],
)
def test_a_model_is_named_after_its_folder_or_its_repository(tmp_path: Path, folder: str, name: str) -> None:
    path = tmp_path / folder
    shutil.copytree(DEMO, path)
    args = AppArgs(model=str(path))
    args.check()
    assert args.name == name
    assert AppArgs(model=str(path), model_name="other").name == "other"


def test_a_folder_whose_name_cannot_be_a_models_name_is_refused_with_the_option(tmp_path: Path) -> None:
    path = tmp_path / "my model"
    shutil.copytree(DEMO, path)
    with pytest.raises(ValueError, match=r"'my model' must not .* white space; choose another with --model-name"):
        AppArgs(model=str(path)).check()
    assert AppArgs(model=str(path), model_name="mine").check()


def test_what_is_worth_knowing_about_a_model_is_told_at_its_start(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(DEMO, path)

    def edit(file: str, **changes: Any) -> None:
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | changes))

    def notes(**args: Any) -> list[str]:
        made = AppArgs(model=str(path), **args)
        chat_format, *others = made.notes(made.check())
        assert chat_format.startswith("Chat format: calls in XML")
        return others

    assert notes() == ["Sampling defaults of generation_config.json: temperature 1, top_p 0.95."]
    assert notes(generation_config=False) == []
    edit("generation_config.json", max_new_tokens=300)
    assert notes()[1:] == ["Every answer ends after 300 tokens: generation_config.json has max_new_tokens = 300."]
    edit("generation_config.json", eos_token_id=None, top_k="many")
    edit("config.json", eos_token_id=None)
    assert notes(generation_config=False) == [], "the tokenizer names an end"
    edit("tokenizer_config.json", eos_token=None)
    [warning] = notes(generation_config=False)
    assert warning.startswith("Warning: neither the configs nor the tokenizer name an end-of-sequence token")
    with pytest.raises(
        ValueError, match=r"generation_config\.json has top_k = 'many'; allowed is an integer, or no value"
    ):
        notes()


def test_without_a_prefix_cache_no_memory_is_kept_for_one() -> None:
    family = AppArgs().check()
    assert AppArgs().memory_plan(family).num_checkpoint_slots > 0
    assert AppArgs(prefix_cache=False).memory_plan(family).num_checkpoint_slots == 0


@pytest.mark.parametrize(
    "args", [{"backbone_gpus": 2}, {"draft_tokens": -1}, {"draft_tokens": 17}, {"max_waiting": 0}, {"http_port": 0}]
)
def test_numbers_out_of_their_bounds_are_refused_by_name(args: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(args))):
        AppArgs(**args)  # type: ignore[arg-type]


def test_the_demo_is_served_under_its_name() -> None:
    assert AppArgs().name == "demo"
    assert AppArgs(model=str(DEMO), model_name="x").name == "x"
    assert AppArgs(model="/models/Nano-30B/").name == "Nano-30B"


def test_the_environment_says_where_the_store_is_and_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis() as server:
        monkeypatch.setenv("EXPERTMESH_REDIS_URL", server.url)
        monkeypatch.setenv("EXPERTMESH_REDIS_PASSWORD", "open sesame")
        args = AppArgs()
        assert args.redis_url == server.url
        assert "sesame" not in repr(args)
        with Redis(port=server.port) as redis:
            redis.config_set("requirepass", "open sesame")
        assert asyncio.run(shards_of(args)) == []
        with pytest.raises(StoreUnavailable, match=r"(?i)invalid username-password"):
            asyncio.run(shards_of(AppArgs(redis_password="wrong")))


async def shards_of(args: AppArgs) -> list[Shard]:
    registry = args.registry()
    try:
        return await registry.shards()
    finally:
        await registry.redis.aclose()


def test_replicas_run_on_nodes_with_their_labels() -> None:
    here, there = {"group": "backbone"}, {"group": "experts"}
    app = build_as_serve_does(build_app, {"labels": here, "pools": [{"name": "a", "labels": there}, {"name": "b"}]})
    labels = {built.name: built.ray_actor_options.get("label_selector") for built in build(app)}
    assert labels == {"gateway": here, "backbone": here, "controller": here, "a": there, "b": None}


def test_gpus_are_asked_for_by_device_or_by_number() -> None:
    pools = [
        {"name": "a", "device": "cuda"},
        {"name": "b", "device": "cuda", "num_gpus": 0.5},
        {"name": "c"},
        {"name": "d", "num_gpus": 1},
    ]
    app = build_as_serve_does(build_app, {"device": "cuda", "pools": pools})
    gpus = {built.name: built.ray_actor_options["num_gpus"] for built in build(app)}
    assert gpus == {"gateway": 0, "backbone": 1, "controller": 0, "a": 1, "b": 0.5, "c": 0, "d": 1}


def test_a_model_without_routed_experts_has_no_shards_and_no_controller(tmp_path: Path) -> None:
    app = build_app(AppArgs(model=str(write_served(tmp_path, "dense", hybrid_override_pattern="M-*"))))
    assert {built.name for built in build(app)} == {"gateway", "backbone"}


def build(app: Application) -> list[Deployment]:
    return build_app_of_serve(app, name="app").deployments


@pytest.mark.parametrize("origin", ["https://chat.example.org/", "chat.example.org", "", "https://a b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="each origin must be scheme://host or scheme://host:port without a path"):
        AppArgs(allowed_origins=["*", "http://localhost:3000", origin])
