"""The CPU's kernels, compiled at their first use and kept on disk.

They live for two reasons: PyTorch's own operators cost more to call than a token costs to compute, and their rows
depend on how many rows there are. `model.kernels` decides where they run; the plain PyTorch beside each is the oracle.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numba


def _digest() -> str:
    """Of all that goes into machine code here: numba looks only at the file that a function stands in."""
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:16]


def _writable() -> Path:
    """The user's cache, or where a container's home is read-only, the folder for temporary files."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    return home if os.access(home, os.W_OK) else Path(tempfile.gettempdir()) / "expertmesh"


if "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = str(_writable() / f"kernels-{_digest()}")
