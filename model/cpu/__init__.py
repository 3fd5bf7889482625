"""The CPU kernels are compiled by numba at their first use and cached on disk.

The kernels exist for two reasons. Calling a PyTorch operator takes longer than the arithmetic for one token. And in a
PyTorch product, a row's result may depend on the number of rows. `model.kernels` decides where the kernels run. For
every kernel there is a plain PyTorch version, with which the tests compare the kernel.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numba


def _digest() -> str:
    """Return a digest of all sources in this folder.

    The digest is a part of the cache folder's name. Without the digest, numba would reuse a cached kernel although a
    file that the kernel imports has changed, because numba checks only the file in which the kernel is defined.
    """
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:16]


def _writable() -> Path:
    """Return a writable cache folder: in the user's cache, or with the temporary files if the home is read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    return home if os.access(home, os.W_OK) else Path(tempfile.gettempdir()) / "expertmesh"


if "NUMBA_CACHE_DIR" not in os.environ:
    numba.config.CACHE_DIR = str(_writable() / f"kernels-{_digest()}")
