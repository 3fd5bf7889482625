"""The CPU kernels are compiled by numba at their first use and cached on disk.

They exist for two reasons. A call of a PyTorch operator costs more than a token's arithmetic, and the rows of
PyTorch's products depend on how many rows there are. `model.kernels` decides where the kernels run. For every kernel
there is a plain PyTorch version, which serves as the tests' oracle.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numba


def _digest() -> str:
    """Return a digest of this folder's sources, because numba checks only the file in which a function is defined."""
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:16]


def _writable() -> Path:
    """Return a writable cache folder: the user's, or the one for temporary files if a container's home is read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    return home if os.access(home, os.W_OK) else Path(tempfile.gettempdir()) / "expertmesh"


if "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = str(_writable() / f"kernels-{_digest()}")
