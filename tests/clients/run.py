"""The script runs third-party clients against a server and prints a table of what works.

    python -m tests.clients.run                                    # start a server and try every client
    python -m tests.clients.run --url http://127.0.0.1:8000 --grpc 127.0.0.1:9000 openai_python openai_js

Each client is installed in an environment of its own under `.clients`, in its newest version at the first run and with
`--upgrade`. A client that cannot be installed counts as failed. The exit code is 1 if a client has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.server import server

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".clients"  # outside of `tests`, because packages hold tests of their own
INSTALL_TIMEOUT_S = 1800
CHECK_TIMEOUT_S = 600
TORCH = "torch==2.13.0"  # as in pyproject.toml
SYSTEM_VARIABLES = ("PATH", "LANG", "TMPDIR", "SSL_CERT_FILE")
OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}


@dataclass(frozen=True)
class Client:
    """A `Client` is a third-party client: a script of checks and the packages that the script needs.

    `packages` begins with the package whose version the table shows.
    """

    name: str
    script: str
    packages: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return the name that selects the client on the command line."""
        return self.script.partition(".")[0]

    @property
    def is_javascript(self) -> bool:
        return self.script.endswith(".mjs")

    @property
    def folder(self) -> Path:
        return CACHE / self.key

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"


CLIENTS = (
    Client("openai (Python)", "openai_python.py", ("openai",)),
    Client("openai (JavaScript)", "openai_js.mjs", ("openai", "zod")),
    Client("langchain-openai", "langchain_chat.py", ("langchain-openai",)),
    Client("litellm", "litellm_sdk.py", ("litellm",)),
    Client("litellm's proxy", "litellm_proxy.py", ("litellm[proxy]",)),
    Client("instructor", "instructor_models.py", ("instructor",)),
    Client("pydantic-ai", "pydantic_ai_agent.py", ("pydantic-ai-slim[openai]",)),
    Client("openai-agents", "agents_sdk.py", ("openai-agents",)),
    Client("anthropic (Python)", "anthropic_python.py", ("anthropic",)),
    Client("@ai-sdk/openai", "ai_sdk.mjs", ("@ai-sdk/openai", "ai", "zod")),
    Client("dspy", "dspy_programs.py", ("dspy",)),
    Client("lm-eval", "lm_eval_tasks.py", ("lm-eval[api]", TORCH)),
    Client("guidellm", "guidellm_benchmark.py", ("guidellm", TORCH)),
    Client("llm", "llm_cli.py", ("llm",)),
    Client("gRPC by reflection", "grpc_reflection_only.py", ("grpcio-reflection", "grpcio", "protobuf")),
    Client("schemathesis", "schemathesis_openapi.py", ("schemathesis",)),
)


@dataclass
class Outcome:
    """An `Outcome` holds the client's version, the names of its checks, and an error for each failed check."""

    version: str = ""
    checks: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def install(client: Client, is_upgrade: bool) -> None:
    """Install the newest versions of a client's packages, unless they are installed and `is_upgrade` is False.

    Raises subprocess.SubprocessError if the packages cannot be installed.
    """
    stamp, wanted = client.folder / "installed", "\n".join(client.packages)
    if not is_upgrade and stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(client.folder, ignore_errors=True)
    client.folder.mkdir(parents=True)
    if client.is_javascript:
        names = [f"{package}@latest" for package in client.packages]
        (client.folder / "package.json").write_text("{}")
        _install(client, "npm", "install", "--no-fund", "--no-audit", "--silent", *names)
    else:
        _install(client, sys.executable, "-m", "venv", str(client.folder / "venv"))
        pip = ("-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--upgrade")
        _install(client, str(client.python), *pip, *client.packages)
    stamp.write_text(wanted)


def _install(client: Client, *command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        command,
        cwd=client.folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
    )


def version_of(client: Client) -> str:
    name = client.packages[0].partition("[")[0]
    if client.is_javascript:
        return str(json.loads((client.folder / "node_modules" / name / "package.json").read_text())["version"])
    code = f"import importlib.metadata; print(importlib.metadata.version({name!r}))"
    return subprocess.run([client.python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(client: Client, url: str, grpc_address: str) -> Outcome:
    """Run the checks of an installed client, with few environment variables and an empty home folder."""
    home, outcome = client.folder / "home", Outcome(version_of(client))
    home.mkdir(exist_ok=True)
    script, executable = HERE / client.script, str(client.python)
    if client.is_javascript:  # node looks for packages beside the script
        for file in HERE.glob("*.mjs"):
            shutil.copy(file, client.folder)
        script, executable = client.folder / client.script, "node"
    environment = {name: os.environ[name] for name in SYSTEM_VARIABLES if name in os.environ}
    environment |= OFFLINE | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command, log = [executable, str(script), url, grpc_address], client.folder / "log"
    with log.open("w") as stderr:
        try:
            done = subprocess.run(
                command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=stderr, timeout=CHECK_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            outcome.errors.append(f"The checks took longer than {CHECK_TIMEOUT_S} s; see {log}.")
            return outcome
    for line in done.stdout.decode(errors="replace").splitlines():
        if line.startswith('{"check":'):
            found = json.loads(line)
            outcome.checks.append(found["check"])
            if found["error"] is not None:
                outcome.errors.append(f"{found['check']}: {found['error'][:500]}")
    if not outcome.checks or (done.returncode and not outcome.errors):
        outcome.errors.append(f"The script ended with exit code {done.returncode}; see {log}.")
    return outcome


def try_client(client: Client, url: str, grpc_address: str, is_upgrade: bool) -> Outcome:
    try:
        install(client, is_upgrade)
    except (OSError, subprocess.SubprocessError) as error:
        return Outcome(errors=[f"The client cannot be installed: {error}. {getattr(error, 'stderr', '') or ''}"[-500:]])
    return run(client, url, grpc_address)


@contextmanager
def server_at(url: str | None, grpc_address: str | None) -> Iterator[tuple[str, str]]:
    """Yield the addresses of REST and gRPC; without `url`, start a server and stop it after the block."""
    if url is not None:
        yield url, grpc_address or "127.0.0.1:9000"
        return
    with server() as started:
        yield started.url, started.grpc_address


def table_of(outcomes: dict[str, Outcome]) -> Table:
    table = Table("client", "version", "what was tried", "result", show_lines=True)
    for name, outcome in outcomes.items():
        result = "\n".join(outcome.errors) or "ok"
        table.add_row(name, outcome.version, ", ".join(outcome.checks).replace("_", " "), result)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the clients and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", help=f"all of: {', '.join(client.key for client in CLIENTS)}")
    parser.add_argument("--url", help="address of a running server; default: start one with the demo model")
    parser.add_argument("--grpc", help="gRPC address of the running server; default: 127.0.0.1:9000")
    parser.add_argument("--upgrade", action="store_true", help="install the newest versions again")
    args = parser.parse_args(arguments)
    known = {client.key: client for client in CLIENTS}
    if unknown := sorted(set(args.clients) - set(known)):
        parser.error(f"There are no clients {unknown}; the clients are {', '.join(known)}.")
    outcomes: dict[str, Outcome] = {}
    with server_at(args.url, args.grpc) as (url, grpc_address):
        for client in [known[key] for key in args.clients] or CLIENTS:
            outcome = outcomes[client.name] = try_client(client, url, grpc_address, args.upgrade)
            result = "; ".join(outcome.errors) or f"{len(outcome.checks)} checks ok"
            print(f"{client.name} {outcome.version}: {result}", flush=True)
    Console(width=160).print(table_of(outcomes), markup=False)
    return int(any(outcome.errors for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
