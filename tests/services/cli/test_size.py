"""These tests check the output of `expertmesh size`, and compare its numbers with the engine and the Serve config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cluster.sizing.fit import DRAFT_TOKENS, GIB, PAGE, SAVED_SHARE, UNREAD_TOKENS, Slo
from cluster.sizing.gpus import GPUS
from cluster.sizing.known_models import known_config, known_models
from cluster.sizing.model_sizes import model_sizes
from cluster.sizing.sizing import START_S, Sizing, size
from model.blocks.expert_bank import LocalExperts, memory_of_all
from model.configs.deepseek_v3 import DeepseekV3Config
from model.configs.model_config import ModelConfig
from model.configs.qwen3_next import Qwen3NextConfig
from model.configs.registry import CONFIGS, parse_config
from model.configs.state_spec import BLOCK_SIZE
from model.demo import DEMO
from model.families.checkpoint_family import BackboneModule
from model.families.deepseek_v3 import DeepseekV3
from model.families.nemotron_h import NemotronH
from model.families.qwen3_next import Qwen3Next
from model.families.registry import FAMILIES
from services.args import CHECKPOINT_SHARE, NUM_HOMES, AppArgs
from services.cli import main
from services.cli.size import DTYPES
from services.engine.backbone import PLACEMENT_TIMEOUT_S
from services.engine.drafting.draft_depth import DEFAULT_DRAFT_TOKENS, MAX_UNREAD
from services.engine.drafting.drafter import bytes_per_request
from services.engine.scheduling.memory import plan_memory
from services.expert.control_client import LOAD_TIMEOUT_S

NEMOTRONS = [name for name in known_models() if "Nemotron" in name]
DEEPSEEK, QWEN = "DeepSeek-V3", "Qwen3-Coder-Next"
CONFIG = json.loads((DEMO / "config.json").read_text())


def run(*arguments: str) -> str:
    answer = CliRunner().invoke(main.app, ["size", *arguments], env={"COLUMNS": "80"})
    assert answer.exit_code == 0, answer.output
    return answer.output


def refused(*arguments: str) -> str:
    answer = CliRunner().invoke(main.app, ["size", *arguments])
    assert answer.exit_code == 2
    assert answer.output.startswith("expertmesh: ")
    assert answer.output.count("\n") == 1
    return answer.output.removeprefix("expertmesh: ").strip()


def test_a_model_is_told_in_80_columns() -> None:
    text = run("--model", "nemotron-3-super")
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "NVIDIA-Nemotron-3-Super-120B-A12B in bf16",
        "On h200: 64 requests of 8,192 tokens",
        "225.486",
        "247.222",
    ):
        assert words in text
    for words in (
        "sends for a token, bytes",
        "reads at the start, GB",
        "118 GiB",
        "119 GiB",
        "162.3",
        "9,216",
        "• Backbones: one is enough.",
        "• Network: ",
        "• Volume: ",
    ):
        assert words in text
    assert "Note" not in text


def test_all_models_are_told_in_80_columns() -> None:
    text = run("--model", "all", "--gpu", "l40s")
    assert max(map(len, text.splitlines())) <= 80
    for name in known_models():
        assert name.removeprefix("NVIDIA-") in text
    assert "3-Ultra-550B-A55B in bf16: a backbone is one GPU" in " ".join(text.split())
    report = json.loads(run("--model", "all", "--gpu", "l40s", "--json"))
    assert len(report) == len(known_models()) * len(DTYPES)
    assert ["error" in one for one in report] == ["–" in line.split() for line in text.splitlines()[2:17]]
    assert len(json.loads(run("--model", "all", "--dtype", "fp8", "--json"))) == len(known_models())


def test_json_is_the_sizing() -> None:
    report = json.loads(
        run("--model", "super", "--gpu", "b200", "--dtype", "nvfp4", "--requests", "100", "--context", "4096", "--json")
    )
    made = size(known_config("super"), GPUS["b200"], "nvfp4", Slo(100, 4096))
    expected = json.loads(json.dumps(made.to_dict()))
    assert {key: report[key] for key in expected} == expected
    assert report["model"] == "NVIDIA-Nemotron-3-Super-120B-A12B"
    assert sum(report["stored_bytes"].values()) == made.checkpoint_bytes
    assert report["stored_bytes"].keys() == report["params"].keys()


def test_a_directory_a_file_and_a_name_are_the_same_model(tmp_path: Path) -> None:
    config = tmp_path / "super" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(known_config("super")))
    by_directory, by_file, by_name = (
        json.loads(run("--model", model, "--json")) for model in (str(config.parent), str(config), "SUPER")
    )
    assert by_directory["model"] == by_file["model"] == "super"
    assert by_directory == by_file == {**by_name, "model": "super"}


def test_a_quantization_file_beside_the_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(known_config("nano")))
    quantization = {"quantization": {"quant_algo": "nvfp4", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    report = json.loads(run("--model", str(tmp_path), "--json"))
    assert report["dtype"] == "nvfp4"
    assert report["checkpoint_bytes"] == pytest.approx(19.324e9, rel=1e-4)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    supported = "FP8, NVFP4, W4A16_NVFP4, MIXED_PRECISION"
    sentence = f"hf_quant_config.json has quantization.quant_algo = 'W4A8_AWQ'; supported are {supported}"
    assert refused("--model", str(tmp_path)) == sentence


def test_the_files_of_a_directory_say_how_its_weights_are_stored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = json.loads(run("--model", str(tmp_path), "--gpu", "l4", "--json"))
    assert stored["checkpoint_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    alone = json.loads(run("--model", str(tmp_path / "config.json"), "--gpu", "l4", "--json"))
    assert alone["checkpoint_bytes"] == pytest.approx(stored["checkpoint_bytes"] / 2, rel=1e-3)
    assert alone["backbone_weight_bytes"] == stored["backbone_weight_bytes"]


def test_the_demo_is_sized_with_the_context_it_has() -> None:
    report = json.loads(run("--model", str(DEMO), "--gpu", "l4", "--json"))
    assert report["kv_bytes_per_request"] == 4096 * report["kv_bytes_per_token"]
    assert (report["backbone_gpus"], report["expert_gpus"]) == (1, 2)


def test_every_model_that_can_be_sized_can_be_served() -> None:
    assert set(CONFIGS) == set(FAMILIES)


def test_what_gpus_widen_is_said() -> None:
    text = " ".join(run("--model", "deepseek-v3").split())
    assert "Widening: GPUs widen fp8 weights to bf16 when they load them" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "gpt-4"], "the model 'gpt-4' is no file or directory here, and none of DeepSeek-V3, NVIDIA-"),
        (["--model", "nemotron"], "the model 'nemotron' could be NVIDIA-Nemotron-3-Nano-30B-A3B or NVIDIA-"),
        (["--model", "super", "--gpu", "tpu"], "there is no GPU 'tpu' to size for; allowed are l4, l40s, a100, h100, "),
        (["--model", "super", "--dtype", "int4"], "--dtype is 'int4'; allowed are auto, bf16, fp8, nvfp4"),
        (["--model", "all", "--dtype", "int4"], "--dtype is 'int4'; allowed are auto, bf16, fp8, nvfp4"),
        (["--model", "super", "--requests", "0"], "0 requests cannot be sized for; allowed are 1 to 100,000"),
        (["--model", "super", "--context", "0"], "a context of 0 tokens cannot be sized for; allowed is 1 or more"),
        (["--model", "super", "--context", "999999"], "the context is 999999 tokens; the model allows up to 262144"),
        (["--model", "super", "--itl-ms", "5"], "no number of h200 decodes a token every 5 ms in bf16: the fastest "),
        (["--model", "ultra", "--gpu", "l40s"], "a backbone is one GPU: 69.2 GB of bf16 weights and one request of "),
    ],
)
def test_a_wrong_wish_is_one_sentence(arguments: list[str], sentence: str) -> None:
    assert refused(*arguments).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON: "),
        ("[]", "must hold a JSON object, not a list"),
        ("{}", "config.json has model_type = None; supported are nemotron_h, deepseek_v3, qwen3_next"),
        ("\udcff", "cannot be read: it is not a text file"),
    ],
)
def test_a_damaged_config_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert sentence in refused("--model", str(path))


def test_a_directory_without_a_config_is_one_sentence(tmp_path: Path) -> None:
    assert refused("--model", str(tmp_path)) == f"{tmp_path} is not a model directory: it has no config.json"


# The tests below compare a sizing with the engine's own numbers.


def config_of(name: str) -> tuple[dict[str, Any], ModelConfig]:
    raw = CONFIG if name == "demo" else known_config(name)
    return raw, parse_config(raw)


def sized(name: str, context: int) -> Sizing:
    raw, _ = config_of(name)
    return size(raw, GPUS["b200"], "bf16", Slo(48, context, itl_ms=1000.0))


@pytest.mark.parametrize("name", ["demo", *NEMOTRONS, DEEPSEEK, QWEN])
def test_state_and_drafts_are_the_engines(name: str) -> None:
    assert (PAGE, SAVED_SHARE) == (BLOCK_SIZE, CHECKPOINT_SHARE)
    assert (DRAFT_TOKENS, UNREAD_TOKENS) == (DEFAULT_DRAFT_TOKENS, MAX_UNREAD)
    _, config = config_of(name)
    made, spec = sized(name, 1000), config.state_spec
    assert made.state_bytes_per_request == spec.bytes_per_slot(torch.bfloat16)
    assert made.kv_bytes_per_request == spec.num_blocks(1000) * spec.bytes_per_block(torch.bfloat16)
    num_drafts = DRAFT_TOKENS if made.has_mtp else 0
    assert made.draft_bytes_per_request == bytes_per_request(config, num_drafts)


@pytest.mark.parametrize("context", [64, 4096])
@pytest.mark.parametrize("name", ["demo", *NEMOTRONS])
def test_state_memory_holds_the_requests_that_it_is_sized_for(name: str, context: int) -> None:
    _, config = config_of(name)
    made = sized(name, context)
    memory = plan_memory(
        config.state_spec,
        torch.bfloat16,
        made.state_memory_bytes,
        context,
        made.requests_per_backbone,
        checkpoint_share=CHECKPOINT_SHARE,
        bytes_per_request=made.draft_bytes_per_request,
    )
    assert memory.num_slots == made.requests_per_backbone
    assert memory.num_blocks >= memory.num_slots * config.state_spec.num_blocks(context)


@pytest.mark.parametrize("name", ["demo", *NEMOTRONS])
def test_experts_are_the_models(name: str) -> None:
    raw, config = config_of(name)
    specs = model_sizes(raw).layer_specs("bf16")
    assert [(spec.layer, spec.num_experts, spec.top_k, spec.expert_bytes) for spec in specs] == [
        (shape.layer, shape.num_experts, shape.top_k, shape.nbytes(torch.bfloat16)) for shape in config.expert_shapes
    ]


@pytest.mark.parametrize("name", ["demo", *NEMOTRONS, DEEPSEEK, QWEN])
def test_the_backbones_weights_are_the_models(name: str) -> None:
    """Compare the sizing's bytes of backbone weights with the bytes of the tensors that a backbone holds."""
    raw, config = config_of(name)
    with torch.device("meta"):
        if isinstance(config, DeepseekV3Config):
            model: BackboneModule = DeepseekV3(config, LocalExperts({}), with_mtp=True, has_own_head=True)
        elif isinstance(config, Qwen3NextConfig):
            model = Qwen3Next(config, LocalExperts({}), has_own_head=True)
        else:
            model = NemotronH(config, LocalExperts({}))
    weights = model.state_dict().items()
    fp32 = FAMILIES[raw["model_type"]].fp32_parameters
    held = sum(tensor.numel() * (4 if name.endswith(fp32) else 2) for name, tensor in weights)
    assert sized(name, 1000).backbone_weight_bytes == held


def test_the_start_takes_no_longer_than_backbones_and_the_controller_wait() -> None:
    assert START_S == PLACEMENT_TIMEOUT_S == LOAD_TIMEOUT_S


def test_a_serve_config_with_the_numbers_is_accepted() -> None:
    made = sized("demo", 4096)
    args = AppArgs(
        device="cuda",
        backbone_replicas=made.backbone_gpus,
        state_memory=made.state_memory_bytes,
        max_requests=made.requests_per_backbone,
        pools=[
            {
                "name": "experts-gpu",
                "device": "cuda",
                "shards": made.expert_gpus,
                "memory_budget": made.shard_memory_bytes,
                "host_budget": made.shard_host_bytes,
            }
        ],
    )
    family = args.check()
    assert args.memory_plan(family).num_slots == made.requests_per_backbone
    assert memory_of_all(family.expert_shapes, args.torch_dtype, "cuda").device == made.experts_bytes
    assert NUM_HOMES == 2
    assert made.shard_memory_bytes % GIB == 0
