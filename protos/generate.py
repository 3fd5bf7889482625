"""`python -m protos.generate [--out DIR]` generates the Python code beside the .proto files.

grpcio-tools 1.71.2 generates code of version 5.29, which runs under protobuf 5.29 to 7. grpcio-tools itself needs
another protobuf version than the runtime, so a separate virtual environment holds grpcio-tools. The environment is
created once, in the user's cache directory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

TOOLS = ("grpcio-tools==1.71.2", "setuptools<81")  # grpcio-tools needs pkg_resources, which setuptools 81 no longer has
ROOT = Path(__file__).resolve().parent.parent


def proto_files() -> list[Path]:
    """Return the path of every .proto file, relative to the root of the repository."""
    return sorted(path.relative_to(ROOT) for path in (ROOT / "protos").rglob("*.proto"))


def generated_files() -> list[Path]:
    """Return the paths of the files that `generate` writes, relative to the output directory."""
    suffixes = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    return [path.with_name(path.stem + suffix) for path in proto_files() for suffix in suffixes]


def tool_python() -> Path:
    """Return the interpreter of the virtual environment with grpcio-tools; the first call creates the environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / "expertmesh" / f"{TOOLS[0].replace('==', '-')}-py{version}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS], check=True)
        ready.touch()
    return python


def generate(out: Path) -> None:
    """Write the files of `generated_files` to the folder `out`; raise CalledProcessError if protoc rejects a file."""
    targets = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    command: list[str | Path] = [tool_python(), "-m", "grpc_tools.protoc", f"-I{ROOT}", *targets, *proto_files()]
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate the Python code beside the .proto files.")
    parser.add_argument("--out", type=Path, default=ROOT, help="the directory to write to instead of the repository")
    generate(parser.parse_args().out)
