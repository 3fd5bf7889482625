from __future__ import annotations

from cluster.control.load_store import LoadStore


def recent_windows(store: LoadStore, now: float) -> range:
    """Return the numbers of all windows that `store` keeps at `now` (seconds since 1970), the present window last."""
    return range(store.window(now) - store.keep_s // store.window_s + 1, store.window(now) + 1)
