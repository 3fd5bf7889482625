"""The functions in this file run the commands in docs/kubernetes.md that need no cluster.

`HERE` holds the blocks of commands that need only a checkout. `CLUSTER` holds the text of all blocks that need a
cluster.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.k8s.manifests import ROOT

DOCUMENT = (ROOT / "docs" / "kubernetes.md").read_text()
BLOCKS = re.findall(r"^```(.*?)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
HERE = [code for kind, code in BLOCKS if kind == "sh here"]
CLUSTER = "\n".join(code for kind, code in BLOCKS if kind == "sh cluster")
NEXT = "next"  # overlay for another version of the model; one of the blocks makes this overlay


def run_here(code: str, checkout: Path) -> None:
    """Run commands in the folder `checkout`; raise AssertionError with the standard error if a command fails."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["/bin/bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def make_next(checkout: Path) -> None:
    (code,) = (code for code in HERE if f"k8s/overlays/{NEXT}" in code)
    run_here(code, checkout)
