from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from services.cli import main
from services.cli.status_tables import status_tables
from tests.services.application import expertmesh, free_port
from tests.services.demo import MODEL

ENGINE = {
    "num_running": 2,
    "num_waiting": 0,
    "num_steps": 7,
    "num_slots_taken": 2,
    "num_slots": 64,
    "num_blocks_taken": 9,
    "num_blocks": 100,
}
SHARD = {
    "id": "experts-cpu-0",
    "pool": "experts-cpu",
    "node": "host",
    "endpoint": "127.0.0.1:40001",
    "device": "cpu",
    "num_held": 150,
    "picks_per_s": 30.0,
    "state": "live",
}
COMMANDS = (
    *("up", "check", "chat", "status", "plan", "rebalance", "scale", "drain", "load", "decisions", "trace", "drill"),
    "size",
)
REPORT = {"model": "demo", "health": "ready", "engine": ENGINE, "epoch": 3, "cover": 2, "placement_age_s": 0.25}


def shown(report: dict[str, Any], width: int = 80) -> str:
    output = io.StringIO()
    for table in status_tables(report):
        Console(width=width, file=output).print(table)
    return output.getvalue()


def copy_of_the_model(path: Path, without: str) -> Path:
    """Copy the model to `path`, but leave out the tensor or file named `without`. Return `path`."""
    path.mkdir()
    for file in MODEL.iterdir():
        if file.name not in (without, "model.safetensors"):
            (path / file.name).symlink_to(file)
    tensors = load_file(MODEL / "model.safetensors")
    tensors.pop(without, None)
    save_file(tensors, path / "model.safetensors")
    return path


def fails_with_one_sentence(*arguments: str) -> str:
    """Run a command with faulty arguments; check that the command prints one sentence, and return this sentence."""
    answer = expertmesh(*arguments)
    assert answer.returncode == 2, answer
    assert not answer.stdout
    assert answer.stderr.startswith("expertmesh: ")
    assert answer.stderr.count("\n") == 1
    return answer.stderr.removeprefix("expertmesh: ").strip()


def test_help_lists_the_commands() -> None:
    answer = CliRunner().invoke(main.app, ["--help"])
    assert answer.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in answer.output


def test_summaries_of_commands_are_complete_sentences() -> None:
    answer = CliRunner().invoke(main.app, ["--help"], env={"COLUMNS": "80"})
    assert not [line for line in answer.output.splitlines()[1:] if line.rstrip().endswith(("...", "…"))]
    entries = re.split(r"\n  (?=[a-z])", answer.output.partition("\nCommands:")[2])[1:]
    assert [entry.split()[0] for entry in entries] == list(COMMANDS)
    assert [entry for entry in entries if not entry.rstrip().endswith(".")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    answer = CliRunner().invoke(main.app, [command, "--help"], env={"COLUMNS": "80"})
    assert answer.exit_code == 0
    assert main.app.registered_commands
    assert not [line for line in answer.output.splitlines()[1:] if line.rstrip().endswith(("...", "…"))]
    for parameter in typer.main.get_command(main.app).commands[command].params:  # type: ignore[attr-defined]
        assert parameter.help.endswith("."), parameter.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "--shards", "0"], "--shards"),
        (["up", "--shrads", "3"], "--shrads"),
        (["up", "--draft-tokens", "99"], "--draft-tokens"),
        (["up", "--max-requests", "0"], "--max-requests"),
        (["upp"], "upp"),
        (["scale", "experts-cpu", "0"], "shards"),
        (["load", "--top", "0"], "--top"),
        (["drill"], "--kill"),
    ],
)
def test_a_mistyped_command_is_refused(arguments: list[str], words: str) -> None:
    answer = CliRunner().invoke(main.app, arguments)
    assert answer.exit_code == 2
    assert words in answer.output


ASKING = (
    *(["status"], ["chat", "hello"], ["plan"], ["rebalance"], ["scale", "experts-cpu", "2"], ["drain", "s"], ["load"]),
    *(["decisions"], ["trace", "start"]),
)


@pytest.mark.parametrize("command", ASKING, ids=lambda command: command[0])
def test_without_a_server_it_says_how_to_start_one(command: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    answer = CliRunner().invoke(main.app, [*command, "--url", url])
    assert answer.exit_code == 2
    sentence = f"expertmesh: no Expertmesh server answers at {url} (ConnectError); start one with: expertmesh up\n"
    assert answer.output == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["scale", "experts-cpu"],
            "scale needs either a number of shards or --auto, which leaves the number to the load",
        ),
        (["scale", "experts-cpu", "2", "--auto"], "scale needs either a number of shards or --auto"),
        (["up", "--limit", "body=1"], "there is no limit 'body'; the limits are body_bytes, json_depth, "),
        (["up", "--limit", "body_s=soon"], "the limit body_s must be a valid number, not 'soon'"),
        (["trace", "pause"], "trace 'pause' is neither start nor stop"),
        (["drill", "--kill", "redis"], "--kill is 'redis'; the only thing that a drill kills is a shard"),
        (["drill", "--kill", "shard", "--url", "http://10.0.0.1:8000"], "--url is http://10.0.0.1:8000, but a drill "),
    ],
)
def test_what_makes_no_sense_is_one_sentence(arguments: list[str], sentence: str) -> None:
    answer = CliRunner().invoke(main.app, arguments)
    assert answer.exit_code == 2
    assert answer.output.startswith(f"expertmesh: {sentence}")
    assert answer.output.count("\n") == 1


def test_a_wrong_path_is_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    assert fails_with_one_sentence("up", "--model", str(missing)) == f"the model path {missing} is not a directory"


@pytest.mark.parametrize(
    "tensor",
    ["backbone.norm_f.weight", "backbone.layers.1.mixer.experts.3.up_proj.weight", "mtp.layers.0.hnorm.weight"],
)
def test_a_missing_tensor_is_one_sentence_that_names_it(tensor: str, tmp_path: Path) -> None:
    path = copy_of_the_model(tmp_path / "model", without=tensor)
    expected = f"the checkpoint {path} has no tensor {tensor} (1 missing in all)"
    assert fails_with_one_sentence("up", "--model", str(path)) == expected


def test_a_missing_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    path = copy_of_the_model(tmp_path / "model", without="tokenizer.json")
    assert str(path) in fails_with_one_sentence("up", "--model", str(path))


def test_check_tells_a_whole_model_from_one_that_is_cut_off(tmp_path: Path) -> None:
    answer = expertmesh("check", "--model", str(MODEL))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith(f"{MODEL.resolve()} can be served: ")
    assert "Sampling defaults of generation_config.json: temperature 1, top_p 0.95." in answer.stdout
    path = copy_of_the_model(tmp_path / "model", without="tokenizer.json")
    assert str(path) in fails_with_one_sentence("check", "--model", str(path))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights} is not a readable safetensors file" in fails_with_one_sentence("check", "--model", str(path))


def test_check_takes_a_name_for_a_model_whose_directory_has_a_space(tmp_path: Path) -> None:
    path = str(copy_of_the_model(tmp_path / "my model", without=""))
    assert fails_with_one_sentence("check", "--model", path) == (
        "The model name 'my model' must not be empty and must not contain braces or white space; "
        "choose another with --model-name (model_name in a Serve config)."
    )
    answer = expertmesh("check", "--model", path, "--model-name", "mine")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert f"{path} can be served: " in answer.stdout


def test_an_unknown_log_format_is_one_sentence() -> None:
    sentence = fails_with_one_sentence("up", "--log-format", "xml")
    assert sentence == "log_format is 'xml': Input should be 'json' or 'text'"


def test_a_context_over_the_models_own_is_one_sentence() -> None:
    sentence = fails_with_one_sentence("up", "--model", str(MODEL), "--max-model-len", "999999")
    assert sentence.startswith("max_model_len is 999999; the model allows up to ")


def test_status_fits_a_narrow_terminal() -> None:
    text = shown({**REPORT, "shards": [SHARD, {**SHARD, "id": "experts-cpu-1", "state": "unreachable"}]})
    for words in ("demo: ready", "epoch 3, cover 2", "0.2 s", "experts-cpu-0", "127.0.0.1:40001", "50%", "150"):
        assert words in text


def test_status_tells_risk_and_orders_in_a_narrow_terminal() -> None:
    pace = {"call_us": 50.0, "weight_us_per_mib": 100.0, "row_us_per_mib": 10.0}
    shard = {**SHARD, "pace": pace, "queue_depth": 3, "blast_radius": 0.125, "circuit": "half-open"}
    pool = {"name": "experts-cpu", "num_shards": 3, "num_draining": 1, "num_ordered": 4, "queue_depth": 3}
    order = {"kind": "drain", "subject": "experts-cpu-0", "count": 0, "by": "ada", "at": 0.0}
    tier = {
        "experts_below_cover": 7,
        "time_to_repair_s": 4.2,
        "last_repair_s": None,
        "balancedness": {"1": 0.5, "3": 1.0},
        "blast_radius": {"experts-cpu-0": 0.125},
    }
    fleet = {"tier": tier, "leader": "host-1", "pools": [pool], "orders": [order]}
    text = shown({**REPORT, **fleet, "shards": [shard], "decisions": [{"at": "0", "kind": "plan", "why": "A test."}]})
    for words in ("7 experts", "12.50%", "~4 s left", "0.75", "host-1", "half-open", "drain", "ada", "A test.", "4"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80


def test_status_without_shards_says_that_the_experts_are_local() -> None:
    text = shown({key: REPORT[key] for key in ("model", "health", "engine")})
    assert "local experts" in text
    assert "Expert shards" not in text
