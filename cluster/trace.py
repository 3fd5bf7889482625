"""Routing traces: which experts each batch picked, as a backbone recorded it, to be replayed through the planner.

A trace is a file of JSON lines. The first describes it: {"format": "expertmesh-trace", "version": 1, "model": the
checkpoint's digest, "started": seconds since 1970, "layers": {layer: number of experts}}. Each other line is one call
of a MoE layer: {"at": seconds since the start, "layer": layer, "picks": [[expert ids of a row], ...]}. A last line that
was cut off is passed over: whoever wrote it died.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.load import Counts, ExpectedLoad, expected_load
from cluster.placement.balance import busy_times
from cluster.topology import Homes

FORMAT, VERSION = "expertmesh-trace", 1
WINDOW_S = 1.0


def header(model: str, started: float, num_experts: Mapping[int, int]) -> str:
    """The first line."""
    layers = {str(layer): count for layer, count in num_experts.items()}
    return _line({"format": FORMAT, "version": VERSION, "model": model, "started": started, "layers": layers})


def batch_line(at: float, layer: int, picks_NK: NDArray[np.integer]) -> str:
    """The line of one call."""
    return _line({"at": round(at, 4), "layer": layer, "picks": picks_NK.tolist()})


def _line(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Trace:
    """`counts_WE` are picks per expert in windows of one second, by layer; `num_rows` are rows of all calls."""

    model: str
    num_experts: Mapping[int, int]
    counts: Mapping[int, Counts]
    num_calls: int
    num_rows: int

    @property
    def rows_per_call(self) -> float:
        return self.num_rows / self.num_calls if self.num_calls else 0.0

    def loads(self) -> dict[int, ExpectedLoad]:
        """What to expect if the load goes on as it was recorded."""
        return {
            layer: expected_load(counts_WE, np.arange(len(counts_WE), 0, -1) * WINDOW_S, WINDOW_S)  # type: ignore[arg-type]
            for layer, counts_WE in self.counts.items()
        }

    def balancedness(self, homes: Mapping[int, Homes]) -> dict[int, float]:
        """Of each layer that was used: mean over maximum of the shards' picks, shared out over homes as evenly as they
        can be, which is what backbones aim at."""
        ids = sorted({id for of_layer in homes.values() for of_one in of_layer for id in of_one})
        index = {id: number for number, id in enumerate(ids)}
        values = {}
        for layer, counts_WE in self.counts.items():
            num_E = np.fromiter(map(len, homes[layer]), np.int64, len(homes[layer]))
            homes_EH = np.full((len(num_E), max(1, int(num_E.max(initial=0)))), -1, np.int64)
            for expert, of_one in enumerate(homes[layer]):
                homes_EH[expert, : len(of_one)] = [index[id] for id in of_one]
            work_EC = np.stack([np.zeros(len(num_E)), counts_WE.sum(axis=0).astype(np.float64)], axis=1)
            cost_SP = np.tile([0.0, 0.0, 1.0], (len(ids), 1))
            picks_S = busy_times(work_EC, cost_SP, homes_EH, num_E, np.full(len(num_E), -1, np.int64))
            values[layer] = float(picks_S.mean() / picks_S.max()) if picks_S.any() else 1.0
        return values


def read_trace(path: Path) -> Trace:
    """Raises ValueError for a file that is none, or that is damaged before its last line."""
    try:
        with path.open(encoding="utf-8") as lines:
            return parse_trace(lines, str(path))
    except OSError as error:
        raise ValueError(f"The trace {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"The file {path} is no trace: it is not text.") from None


def parse_trace(lines: Iterable[str], name: str) -> Trace:
    """`name` is what errors call it."""
    rows = iter(lines)
    model, num_experts = _read_header(next(rows, ""), name)
    windows: dict[int, dict[int, Counts]] = defaultdict(dict)
    num_calls = num_rows = 0
    for number, line in enumerate(rows, 2):
        if not line.endswith("\n"):
            break
        at, layer, picks_NK = _read_batch(line, num_experts, f"Line {number} of the trace {name}")
        counts_E = windows[layer].setdefault(int(at // WINDOW_S), np.zeros(num_experts[layer], np.int64))
        counts_E += np.bincount(picks_NK.reshape(-1), minlength=num_experts[layer])
        num_calls, num_rows = num_calls + 1, num_rows + len(picks_NK)
    if not num_calls:
        raise ValueError(f"The trace {name} holds no calls: record it while requests are answered.")
    last = max(window for of_layer in windows.values() for window in of_layer)
    counts = {
        layer: np.stack([of_layer.get(window, np.zeros(num_experts[layer], np.int64)) for window in range(last + 1)])
        for layer, of_layer in sorted(windows.items())
    }
    return Trace(model, num_experts, counts, num_calls, num_rows)


def _read_header(line: str, name: str) -> tuple[str, dict[int, int]]:
    try:
        body = json.loads(line)
        if (body["format"], body["version"]) != (FORMAT, VERSION):
            raise ValueError
        return str(body["model"]), {int(layer): int(count) for layer, count in body["layers"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(
            f"The file {name} is no trace: its first line is not the header of version {VERSION}."
        ) from None


def _read_batch(line: str, num_experts: Mapping[int, int], where: str) -> tuple[float, int, NDArray[np.int64]]:
    try:
        body = json.loads(line)
        at, layer = float(body["at"]), int(body["layer"])
        picks_NK = np.array(body["picks"], np.int64)
        if at < 0 or picks_NK.ndim != 2:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where} is not a call: it needs at, layer and picks, a list of rows of equal length."
        ) from None
    if layer not in num_experts or picks_NK.min(initial=0) < 0 or picks_NK.max(initial=0) >= num_experts[layer]:
        raise ValueError(f"{where} picks an expert of layer {layer} that the header does not know.")
    return at, layer, picks_NK
