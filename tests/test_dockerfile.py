"""These tests check the Dockerfile: the linter accepts it, its public base images have digests, and its steps work.

The image must not run as root. The tests run the steps in a clean directory, except the steps that need root or apt.
Steps that install packages find the packages already installed in the environment of the tests.
`python -m tests.test_dockerfile` runs the same steps with an empty environment and takes two minutes. `make test` also
begins with an installation into an empty environment.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from dockerfile_parse import DockerfileParser

from services.cli.main import RAY_DEFAULTS

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "Dockerfile"
NEEDS_ROOT = ("apt-get", "useradd")


class Step(NamedTuple):
    """A `Step` is one step of the Dockerfile, such as ("RUN", "pip install …")."""

    instruction: str
    value: str


def stages() -> dict[str, list[Step]]:
    """Return a dict from the name of each stage to the stage's steps. Steps before the first stage have the name ""."""
    with tempfile.TemporaryDirectory() as folder:  # the parser gets a copy, because it writes to its file
        parsed = DockerfileParser(str(shutil.copy(DOCKERFILE, folder))).structure
    found: dict[str, list[Step]] = {"": []}
    for step in (Step(step["instruction"], step["value"]) for step in parsed if step["instruction"] != "COMMENT"):
        if step.instruction == "FROM":
            found[step.value.rpartition(" AS ")[2]] = []
        found[next(reversed(found))].append(step)
    return found


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([Path(sys.prefix) / "bin" / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_finds_a_planted_fault(tmp_path: Path) -> None:
    faulty = tmp_path / "Dockerfile"
    faulty.write_text(DOCKERFILE.read_text().replace("--no-install-recommends ", ""))
    done = subprocess.run([Path(sys.prefix) / "bin" / "hadolint", faulty], capture_output=True, text=True)
    assert "DL3015" in done.stdout


def test_public_bases_are_pinned_by_digest() -> None:
    names = {*stages(), "wheels-${ACCELERATOR}"}
    bases = [steps[0].value.partition(" AS ")[0] for name, steps in stages().items() if name]
    public = [base for base in bases if base not in names]
    assert len(public) == 2
    assert all("@sha256:" in base for base in public)


def test_every_accelerator_has_its_wheels() -> None:
    assert {"wheels-cpu", "wheels-gpu"} <= stages().keys()


def test_wheels_are_built_on_the_system_on_which_they_run() -> None:
    """A wheel that was built against a newer C library than the image's does not load."""
    built, run = (stages()[name][0].value.partition(" AS ")[0] for name in ("wheels-gpu", "runtime"))
    assert built == run == "python"


@pytest.mark.parametrize(("accelerator", "has_compiler"), [("cpu", False), ("gpu", True)])
def test_the_image_for_gpus_has_the_compiler_that_triton_needs(accelerator: str, has_compiler: bool) -> None:
    """Run the step that installs packages, with functions of the shell in place of the commands that need root."""
    [step] = [value for _, value in stages()["runtime"] if "apt-get" in value]
    commands = "apt-get() { echo apt-get $*; }; rm() { :; }; useradd() { :; }"
    script = f"{commands}; ACCELERATOR={accelerator}; {step}"
    asked = subprocess.check_output(["/bin/bash", "-o", "pipefail", "-euc", script], text=True).split()
    assert "wget" in asked
    assert {"gcc", "libc6-dev"} <= {*asked} if has_compiler else not {"gcc", "libc6-dev"} & {*asked}


def test_the_image_does_not_run_as_root() -> None:
    users = [step.value for step in stages()["runtime"] if step.instruction == "USER"]
    assert users == ["10001:10001"]


def test_all_our_packages_are_in_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {step.value.split()[0] for step in stages()["runtime"] if step.instruction == "COPY"}
    assert packages <= copied


def test_ray_gets_what_the_command_line_would_set() -> None:
    words = " ".join(step.value for step in stages()["runtime"] if step.instruction == "ENV").split()
    environment = dict(word.split("=", 1) for word in words)
    assert {name: environment.get(name) for name in RAY_DEFAULTS} == RAY_DEFAULTS
    assert environment["PYTHONPATH"] == "/app"


def run_steps(folder: Path, python: Path) -> None:
    """Run the steps of the CPU image with the interpreter `python`, except steps that need root.

    The image's folders /wheels and /app are made in `folder`.
    """
    folder.mkdir()
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}", "HOME": str(folder), "ACCELERATOR": "cpu"}
    env |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "TORCH_INDEX"))}
    here = folder
    for instruction, value in [*stages()["wheels-cpu"], *stages()["runtime"]]:
        inside = value.replace("/wheels", f"{folder}/wheels").replace("/app", f"{folder}/app")
        if instruction == "WORKDIR":
            here = Path(inside)
            here.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY" and not value.startswith("--from"):
            source, target = value.split()
            is_folder = (ROOT / source).is_dir()
            (shutil.copytree if is_folder else shutil.copy)(ROOT / source, here / target)
        elif instruction == "RUN" and not any(word in value for word in NEEDS_ROOT):
            subprocess.run(["/bin/bash", "-o", "pipefail", "-ec", inside], cwd=here, env=env, check=True, timeout=600)
    check = [python.parent / "expertmesh", "up", "--help"]
    done = subprocess.run(check, cwd=folder, env={**env, "PYTHONPATH": str(here)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--backbones" in done.stdout
    where = [python, "-c", "import services, model; print(services.__file__, model.__file__)"]
    files = subprocess.check_output(where, cwd="/", env={**env, "PYTHONPATH": str(here)}, text=True).split()
    assert all(Path(path).is_relative_to(here) for path in files)


def test_the_steps_of_the_cpu_image_run_in_a_clean_directory(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    own = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    (Path(own) / "of_the_tests.pth").write_text(site.getsitepackages()[0])
    run_steps(tmp_path / "image", python)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-m", "venv", f"{name}/venv"], check=True)
        run_steps(Path(name) / "image", Path(name) / "venv" / "bin" / "python")
