"""These tests download models from a local server that speaks the hub's API, in processes with a cache of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.demo import DEMO
from services.args import AppArgs
from services.hub import Repository, absolute_path, model_directory
from tests.services.application import COMMAND, ENVIRONMENT, ROOT, Application
from tests.services.hub_server import COMMIT, TOKEN, HubRepository, HubServer

FIND = """
import sys
from services.hub import model_directory

for model in sys.argv[1:]:
    try:
        print(model_directory(model, sys.stderr.write))
    except ValueError as error:
        print("refused:", error)
"""
HUGE = 10**16  # bytes; more than any disk of a test machine has


@dataclass
class Machine:
    """A `Machine` runs commands in processes that use the hub at `url` and have an empty cache in `home` at first."""

    url: str
    home: Path

    def environment(self, **variables: str) -> dict[str, str]:
        mine = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**mine, "HF_ENDPOINT": self.url, "HF_HOME": str(self.home), "PYTHONPATH": str(ROOT), **variables}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.home, env=self.environment(**variables), capture_output=True, text=True, timeout=90
        )

    def find(self, *models: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Look up `models` in one process, which prints the directory or the refusal of each."""
        return self.run(sys.executable, "-c", FIND, *models, **variables)

    def refusals(self, *models: str, **variables: str) -> list[str]:
        """Return the messages of the ValueErrors with which the lookups of `models` fail."""
        lines = self.find(*models, **variables).stdout.splitlines()
        assert all(line.startswith("refused: ") for line in lines), lines
        return [line.removeprefix("refused: ") for line in lines]

    def expertmesh(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(*COMMAND, *arguments, **variables)

    def directory(self, repository: str) -> Path:
        return self.home / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of the demo's checkpoint with three files that serving does not need."""
    path = tmp_path / "source"
    (path / "original").mkdir(parents=True)
    for file in DEMO.iterdir():
        (path / file.name).symlink_to(file)
    for name in ("README.md", "pytorch_model.bin", "original/model.safetensors"):
        (path / name).write_text("not needed")
    return path


@pytest.fixture
def hub(source: Path) -> Iterator[HubServer]:
    repositories = {
        "acme/demo": HubRepository(source),
        "acme/gated": HubRepository(source, is_gated=True),
        "acme/huge": HubRepository(source, sizes=(("model.safetensors", HUGE),)),
    }
    with HubServer(repositories) as server:
        yield server


@pytest.fixture
def machine(hub: HubServer, tmp_path: Path) -> Machine:
    (tmp_path / "home").mkdir()
    return Machine(hub.url, tmp_path / "home")


def test_only_a_name_that_is_no_directory_is_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Repository.parse("acme/demo-1.5") == Repository("acme/demo-1.5", "main")
    assert Repository.parse("acme/demo@refs/pr/1") == Repository("acme/demo", "refs/pr/1")
    for path in ("/acme/demo", "./acme", "../demo", "demo", "acme/models/demo", "acme/demo/", "~/demo", ""):
        assert Repository.parse(path) is None, path
    assert absolute_path("acme/demo") == "acme/demo"
    (tmp_path / "acme" / "demo").mkdir(parents=True)
    assert Repository.parse("acme/demo") is None
    assert absolute_path("acme/demo") == str(tmp_path / "acme" / "demo")
    assert model_directory("acme/demo", pytest.fail) == "acme/demo"


def test_a_repository_is_downloaded_once_and_without_files_that_serving_does_not_need(
    hub: HubServer, machine: Machine, source: Path
) -> None:
    first = machine.find("acme/demo")
    directory = machine.directory("acme/demo")
    assert first.stdout.strip() == str(directory), first
    assert first.stderr.startswith("downloading acme/demo: 23.")
    assert {file.name for file in directory.iterdir()} == {file.name for file in DEMO.iterdir() if file.is_file()}
    assert (directory / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    hub.requests.clear()
    again = machine.find("acme/demo", f"acme/demo@{COMMIT}")
    assert (again.stdout, again.stderr) == (2 * first.stdout, "")
    assert hub.requests == [], "the cache holds the revision"


def test_a_file_that_the_cache_lacks_is_downloaded(hub: HubServer, machine: Machine) -> None:
    machine.find("acme/demo")
    (machine.directory("acme/demo") / "tokenizer.json").resolve().unlink()
    (machine.directory("acme/demo") / "tokenizer.json").unlink()
    offline = "is no directory here and is not complete in the cache"
    [refusal] = machine.refusals("acme/demo", HF_HUB_OFFLINE="1")
    assert offline in refusal
    hub.requests.clear()
    assert machine.find("acme/demo").stderr.startswith("downloading acme/demo: ")
    downloaded = [request for request in hub.requests if request.startswith("GET /acme/")]
    assert downloaded == [f"GET /acme/demo/resolve/{COMMIT}/tokenizer.json"]


def test_what_cannot_be_downloaded_is_one_sentence(machine: Machine) -> None:
    url, cache = machine.url, machine.home / "hub"
    missing, revision, gated, full = machine.refusals("acme/none", "acme/demo@v9", "acme/gated", "acme/huge")
    assert missing == (
        f"acme/none is neither a directory here nor a repository that {url} shows; check the name, or set HF_TOKEN if "
        "the repository is private"
    )
    assert revision == f"the repository acme/demo at {url} has no revision v9; leave it out for main"
    steps = f"accept its terms at {url}/acme/gated and set HF_TOKEN to a token of that account"
    assert gated == (
        f"the repository acme/gated is gated, and without a token in HF_TOKEN there is no access to it; {steps}"
    )
    assert full.startswith(f"acme/huge takes 10,000,000.0 GB, but the disk of the cache {cache} has ")
    assert full.endswith(" GB free; free some space, or set HF_HOME to a folder on another disk")
    assert machine.refusals("acme/gated", HF_TOKEN="hf_of_a_stranger") == [
        f"the repository acme/gated is gated, and the token in HF_TOKEN does not have access to it; {steps}"
    ]


def test_without_network_and_cache_the_refusal_names_both(machine: Machine) -> None:
    missing = f"acme/demo is no directory here and is not complete in the cache {machine.home / 'hub'}, and"
    assert machine.refusals("acme/demo", HF_HUB_OFFLINE="1") == [
        f"{missing} HF_HUB_OFFLINE forbids downloads; unset it, or give the path of a directory"
    ]
    assert Machine("http://127.0.0.1:9", machine.home).refusals("acme/demo") == [
        f"{missing} it could not be downloaded from http://127.0.0.1:9 ([Errno 111] Connection refused); try again to "
        "continue the download"
    ]


def test_a_cache_that_is_no_directory_is_refused(hub: HubServer, machine: Machine, tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    end = "; set HF_HOME or HF_HUB_CACHE to a directory"
    assert machine.find("acme/demo", HF_HUB_CACHE=str(file)).stdout == (
        f"refused: the cache {file} is not a directory{end}\n"
    )
    answer = machine.find("acme/demo", HF_HOME=str(file))
    reason = f"the cache {file}/hub cannot be created, because {file} is not a directory"
    assert (answer.stdout, answer.stderr) == (f"refused: {reason}{end}\n", "")
    assert hub.requests == []


def test_a_gated_repository_is_downloaded_with_a_token_that_has_access(machine: Machine) -> None:
    assert machine.find("acme/gated", HF_TOKEN=TOKEN).stdout.strip() == str(machine.directory("acme/gated"))


def test_commands_take_the_name_of_a_repository(hub: HubServer, machine: Machine) -> None:
    sized = machine.expertmesh("size", "--model", "acme/demo", "--json")
    assert json.loads(sized.stdout)["model"] == "acme/demo", sized
    assert f"GET /acme/demo/resolve/{COMMIT}/model.safetensors" not in hub.requests, "only the config is read"
    checked = machine.expertmesh("check", "--model", "acme/demo")
    assert checked.returncode == 0, checked
    assert checked.stdout.startswith(f"{machine.directory('acme/demo')} can be served: ")
    assert checked.stderr.startswith("expertmesh: downloading acme/demo: ")
    assert checked.stderr.count("\n") == 1
    refused = machine.expertmesh("check", "--model", "acme/gated")
    assert refused.returncode == 2
    assert refused.stderr.startswith("expertmesh: the repository acme/gated is gated, ")
    assert refused.stderr.count("\n") == 1


def test_replicas_on_other_nodes_read_the_commit_that_was_checked(tmp_path: Path) -> None:
    args, directory = AppArgs(model="acme/demo@v1"), tmp_path / "models--acme--demo" / "snapshots" / COMMIT
    assert args.name == "acme/demo"
    pinned = args.pinned(args.model_copy(update={"model": str(directory)}))
    assert pinned.model == f"acme/demo@{COMMIT}"
    assert pinned.name == "acme/demo"
    local = AppArgs(model=str(DEMO))
    assert local.pinned(local.resolved()).model == local.resolved().model == str(DEMO)
    assert local.resolved().name == "demo"


@pytest.mark.serial
def test_up_serves_a_repository_from_the_cache_under_its_name(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.find("acme/demo")
    for name, value in machine.environment(HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9").items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    with Application(1, "--local-experts", "--model", "acme/demo") as application:
        application.wait_until_ready()
        assert [model.id for model in application.openai().models.list()] == ["acme/demo"]
        answer = application.openai().completions.create(model="acme/demo", prompt="def ", max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
        assert f"Starting acme/demo from {machine.directory('acme/demo')}: " in application.output
