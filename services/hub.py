"""A `Repository` is a model repository on a Hugging Face hub; `model_directory` gives the local directory of a model.

The files of a repository are kept in the cache of `huggingface_hub`. The library also reads the environment variables:
`HF_HOME` and `HF_HUB_CACHE` (folder of the cache), `HF_TOKEN`, `HF_ENDPOINT` (address of the hub) and `HF_HUB_OFFLINE`.
`huggingface_hub` is imported only when a repository is looked up, because the import takes memory in every process.
"""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Files that serving needs. Repositories may also hold the weights in other formats, images and training logs.
SERVED_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "chat_template*", "*.jinja")
MAIN = "main"
IN_FOLDERS = "*/*"  # some repositories hold the weights a second time in a folder, in the layout of another program
PERIOD_S = 0.5  # seconds between two reports of a download's progress

Say = Callable[[str], None]


@dataclass(frozen=True)
class Repository:
    """A `Repository` is one revision of a model repository. `id` is ORG/NAME; `revision` is a branch, tag or commit."""

    id: str
    revision: str = MAIN

    @classmethod
    def parse(cls, model: str) -> Repository | None:
        """Return the repository that `model`, ORG/NAME or ORG/NAME@REVISION, names; None if `model` is a path.

        An existing directory with the same name takes precedence over the repository.
        """
        found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", model, re.ASCII)
        return None if found is None or Path(model).is_dir() else cls(found[1], found[2] or MAIN)

    def __str__(self) -> str:
        return self.id if self.revision == MAIN else f"{self.id}@{self.revision}"

    def directory(self, say: Say, files: tuple[str, ...] = SERVED_FILES, period_s: float = PERIOD_S) -> Path:
        """Return the directory in the cache with all files of the repository that match the patterns in `files`.

        The network is used only if the cache does not hold the whole revision. `say` is told the progress of a
        download every `period_s` seconds, from any thread. Raises ValueError with one sentence if the repository cannot
        be found or read, if it can be neither downloaded nor found in the cache, or if the cache is not a directory.
        """
        _check_cache()
        return self._cached(files) or self._downloaded(files, say, period_s)

    def _cached(self, files: tuple[str, ...]) -> Path | None:
        """Return the directory in the cache, or None if the cache lacks a file or does not list the revision's files.

        Without a list of the revision's files, the cache may come from another program that needed only some of them.
        """
        from huggingface_hub import get_cached_repo_tree, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

        try:
            get_cached_repo_tree(self.id, revision=self.revision)
            return Path(snapshot_download(self.id, **self._selection(files), local_files_only=True))
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
            return None

    def _selection(self, files: tuple[str, ...]) -> dict[str, Any]:
        return {"revision": self.revision, "allow_patterns": list(files), "ignore_patterns": IN_FOLDERS}

    def _downloaded(self, files: tuple[str, ...], say: Say, period_s: float) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError, HTTPError  # type: ignore[attr-defined]

        where = self._selection(files)
        try:
            try:
                silent = _counting_bars(lambda _: None, period_s)
                found = snapshot_download(self.id, **where, dry_run=True, tqdm_class=silent)
                missing = [file for file in found if file.will_download]
            except DryRunError:  # the hub does not answer, or refuses; the next call says which
                return Path(snapshot_download(self.id, **where))
            num_bytes = sum(file.file_size or 0 for file in missing)
            _check_space(self, num_bytes)
            say(f"downloading {self}: {_size(num_bytes)}, {len(missing)} {'file' if len(missing) == 1 else 'files'}")
            tell = lambda done: say(f"downloading {self}: {_size(done)} of {_size(num_bytes)}")  # noqa: E731
            bars = _counting_bars(tell, period_s)
            return Path(snapshot_download(self.id, **where, tqdm_class=bars))
        except (HTTPError, OSError, RuntimeError) as error:  # hf_xet, which transfers large files, raises RuntimeError
            raise ValueError(_sentence(self, error)) from error


def model_directory(model: str, say: Say, period_s: float = PERIOD_S) -> str:
    """Return the directory of `model`, which is a directory, or the name of a repository (see `Repository.directory`).

    Any other path is returned as it is.
    """
    repository = Repository.parse(model)
    return model if repository is None else str(repository.directory(say, period_s=period_s))


def absolute_path(model: str) -> str:
    """Return `model` as an absolute path, or unchanged if `model` names a repository."""
    return model if Repository.parse(model) else str(Path(model).resolve())


def _sentence(repository: Repository, error: BaseException) -> str:
    """Return one sentence that tells a user why `repository` could not be read, and what to do."""
    from huggingface_hub import constants, errors, get_token

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    causes = list(_causes(error))

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes):
        return f"the disk of the cache {cache} is full; free some space, or set HF_HOME to a folder on another disk"
    if is_any(errors.GatedRepoError):
        has_token = "the token in HF_TOKEN does not have" if get_token() else "without a token in HF_TOKEN there is no"
        steps = f"accept its terms at {hub}/{repository.id} and set HF_TOKEN to a token of that account"
        return f"the repository {repository.id} is gated, and {has_token} access to it; {steps}"
    if is_any(errors.RepositoryNotFoundError):
        what = f"{repository.id} is neither a directory here nor a repository that {hub} shows"
        return f"{what}; check the name, or set HF_TOKEN if the repository is private"
    if is_any(errors.RevisionNotFoundError):
        return f"the repository {repository.id} at {hub} has no revision {repository.revision}; leave it out for {MAIN}"
    if any(isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code == 401 for cause in causes):
        return f"{hub} refuses the token in HF_TOKEN; set HF_TOKEN to a valid token, or unset it"
    missing = f"{repository} is no directory here and is not complete in the cache {cache}"
    if is_any(errors.OfflineModeIsEnabled):
        return f"{missing}, and HF_HUB_OFFLINE forbids downloads; unset it, or give the path of a directory"
    reason = str(causes[-1]).partition("\n")[0].rstrip(".") or type(causes[-1]).__name__
    return f"{missing}, and it could not be downloaded from {hub} ({reason}); try again to continue the download"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and then the errors that caused it, ending with the first that occurred."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cache() -> tuple[Path, Path]:
    """Return the path of the cache, and the cache itself or the nearest of its parents that exists."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return cache, next(path for path in (cache, *cache.absolute().parents) if path.exists())


def _check_cache() -> None:
    """Raise ValueError if the cache, or the path in which it would be created, is not a directory."""
    cache, found = _cache()
    if not found.is_dir():
        place = "is not a directory" if found == cache else f"cannot be created, because {found} is not a directory"
        raise ValueError(f"the cache {cache} {place}; set HF_HOME or HF_HUB_CACHE to a directory")


def _check_space(repository: Repository, num_bytes: int) -> None:
    """Raise ValueError if the cache's disk has fewer than `num_bytes` of free space."""
    cache, found = _cache()
    free = shutil.disk_usage(found).free
    if num_bytes > free:
        sizes = f"{repository} takes {_size(num_bytes)}, but the disk of the cache {cache} has {_size(free)} free"
        raise ValueError(f"{sizes}; free some space, or set HF_HOME to a folder on another disk")


def _size(num_bytes: float) -> str:
    """Return a size in the largest decimal unit that leaves at least one digit before the point."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def _counting_bars(on_progress: Callable[[int], None], period_s: float) -> Any:
    """Return a class of progress bars that show nothing, but call `on_progress` with the number of bytes on disk.

    The first call comes at once, and further calls at least `period_s` seconds apart.

    `snapshot_download` makes several bars: some count bytes received, some bytes written, and one counts files. Bytes
    of an earlier, interrupted download are only written, so the bar with the most bytes is right.
    """
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    counts: dict[int, int] = {}
    due_at = 0.0

    class CountingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self._counts_bytes = kwargs.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            nonlocal due_at
            if not self._counts_bytes:
                return
            with lock:
                counts[id(self)] = counts.get(id(self), 0) + int(n or 0)
                if (now := time.monotonic()) < due_at:
                    return
                due_at = now + period_s
                done = max(counts.values())
            on_progress(done)

    return CountingBar
