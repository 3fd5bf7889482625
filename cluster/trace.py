"""A routing trace records which experts each batch picked, so that the planner can replay the load.

A trace is a file of JSON lines:

- The first line describes the trace: {"format": "expertmesh-trace", "version": 1, "model": the checkpoint's digest,
  "started": seconds since 1970, "layers": {layer: number of experts}}.
- Every other line is one call of a MoE layer: {"at": seconds since the start, "layer": layer, "picks": [[expert ids of
  a row], ...]}.
- An incomplete last line is ignored: the process that wrote the trace died before it completed the line.
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
WINDOW_S = 1.0  # Length in seconds of the windows in which `Trace` counts picks.


def header(model: str, started: float, num_experts: Mapping[int, int]) -> str:
    """Return the first line of a trace, which describes the trace.

    - `model`: the digest of the checkpoint.
    - `started`: the time of the start in seconds since 1970.
    - `num_experts`: the number of experts of each layer.
    """
    layers = {str(layer): count for layer, count in num_experts.items()}
    return _line({"format": FORMAT, "version": VERSION, "model": model, "started": started, "layers": layers})


def batch_line(at: float, layer: int, picks_NK: NDArray[np.integer]) -> str:
    """Return the line of one call; `at` is in seconds since the start, and `picks_NK` holds each row's expert ids."""
    return _line({"at": round(at, 4), "layer": layer, "picks": picks_NK.tolist()})


def _line(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Trace:
    """A `Trace` holds the picks of a recorded routing trace, counted in windows of one second.

    `counts` holds the picks per window and expert, [W, E], of each layer. `num_rows` counts the rows of all calls.
    """

    model: str
    num_experts: Mapping[int, int]
    counts: Mapping[int, Counts]
    num_calls: int
    num_rows: int

    @property
    def rows_per_call(self) -> float:
        """Return the mean number of rows per call, or 0 without calls."""
        return self.num_rows / self.num_calls if self.num_calls else 0.0

    def loads(self) -> dict[int, ExpectedLoad]:
        """Return the expected load of each layer at the end of the trace."""
        return {
            layer: expected_load(counts_WE, np.arange(len(counts_WE), 0, -1) * WINDOW_S, WINDOW_S)  # type: ignore[arg-type]
            for layer, counts_WE in self.counts.items()
        }

    def balancedness(self, homes: Mapping[int, Homes]) -> dict[int, float]:
        """Return the balancedness of each layer in the trace if the experts had the homes `homes`.

        Balancedness is the mean of the shards' picks divided by the maximum. The method divides the picks of each
        expert among the expert's homes so that the maximum is as small as possible. Backbones divide picks with the
        same aim.
        """
        ids = sorted({id for layer_homes in homes.values() for expert_homes in layer_homes for id in expert_homes})
        index = {id: number for number, id in enumerate(ids)}
        values = {}
        for layer, counts_WE in self.counts.items():
            num_E = np.fromiter(map(len, homes[layer]), np.int64, len(homes[layer]))
            homes_EH = np.full((len(num_E), max(1, int(num_E.max(initial=0)))), -1, np.int64)
            for expert, expert_homes in enumerate(homes[layer]):
                homes_EH[expert, : len(expert_homes)] = [index[id] for id in expert_homes]
            work_EC = np.stack([np.zeros(len(num_E)), counts_WE.sum(axis=0).astype(np.float64)], axis=1)
            cost_SP = np.tile([0.0, 0.0, 1.0], (len(ids), 1))
            picks_S = busy_times(work_EC, cost_SP, homes_EH, num_E, np.full(len(num_E), -1, np.int64))
            values[layer] = float(picks_S.mean() / picks_S.max()) if picks_S.any() else 1.0
        return values


def read_trace(path: Path) -> Trace:
    """Read a trace from the file `path`.

    Raises ValueError if the file cannot be read, is not a trace or is damaged. An incomplete last line is ignored.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return parse_trace(lines, str(path))
    except OSError as error:
        raise ValueError(f"The trace {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"The file {path} is no trace: it is not UTF-8 text.") from None


def parse_trace(lines: Iterable[str], name: str) -> Trace:
    """Read a trace from the lines of a file; error messages call the trace `name`.

    Raises ValueError if a line is wrong. An incomplete last line is ignored.
    """
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
        raise ValueError(f"The trace {name} holds no calls; record one while requests are answered.")
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
            f"The file {name} is no trace: its first line must be the header of a trace of version {VERSION}."
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
        raise ValueError(f"{where} picks an expert of layer {layer} that the header does not list.")
    return at, layer, picks_NK
