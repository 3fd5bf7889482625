"""These checks let schemathesis send what `/openapi.json` allows, and what it does not; no answer may be a 5xx."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from checks import run_checks

MAX_EXAMPLES = 25  # examples of each operation and phase
SEED = 1


def no_server_error(url: str) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--url", url]
    options = ["--checks", "no_needless_server_error", "--mode", "all", "--max-examples", str(MAX_EXAMPLES)]
    limits = ["--request-timeout", "60", "--seed", str(SEED), "--generation-database", "none", "--no-color"]
    here = str(Path(__file__).parent)
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": here}
    done = subprocess.run([*command, *options, *limits], env=environment, capture_output=True, text=True, timeout=540)
    print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    assert done.returncode == 0, done.stdout[-1500:]


if __name__ == "__main__":
    run_checks(no_server_error)
