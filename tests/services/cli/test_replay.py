from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.topology import LayerSpec, Placement, Shard
from cluster.trace import batch_line, header
from services.cli.replay import replay

LAYERS = [LayerSpec(2, 8, 1 << 20, 2)]
SHARDS = [Shard(id, "127.0.0.1:1", "n", "experts-cpu", "cpu", "i", 1 << 30) for id in "abcd"]
CROWDED = Placement(5, {2: (("a", "b"),) * 4 + (("c", "d"),) * 4}, {}, "digest")


def fleet_of(placement: Placement | None) -> dict[str, Any]:
    """Return the server's answer to GET /admin/placement while `placement` is published, as JSON values."""
    published = placement and {
        "epoch": placement.epoch,
        "model": placement.model,
        "homes": {str(layer): [list(ids) for ids in homes] for layer, homes in placement.homes.items()},
        "standby": {},
    }
    shards = [shard.to_json() for shard in SHARDS]
    return {"layers": list(map(asdict, LAYERS)), "shards": shards, "placement": published}


def write_trace(path: Path, model: str = "digest") -> Path:
    """Write a trace to the file `path`, and return `path`.

    In the trace, only experts of the shards a and b are picked.
    """
    draw = np.random.default_rng(0)
    picks = [draw.permuted(np.tile(np.arange(4), (16, 1)), axis=1)[:, :2] for _ in range(40)]
    lines = [batch_line(0.1 * number, 2, picks_NK) for number, picks_NK in enumerate(picks)]
    path.write_text(header(model, 1e9, {2: 8}) + "".join(lines))
    return path


def test_a_trace_shows_what_would_be_planned_for_its_load(tmp_path: Path) -> None:
    report = replay(write_trace(tmp_path / "t.jsonl"), fleet_of(CROWDED))
    assert report["balancedness"]["before"] == pytest.approx(0.5, abs=0.01)
    assert report["balancedness"]["after"] > 0.8
    assert report["predicted_s_after"] < report["predicted_s_before"]
    assert report["text"].startswith("40 calls of 16.0 rows on average, in ")
    assert "mean of the layers): 0.500 now, " in report["text"]


def test_a_trace_of_another_model_is_one_sentence(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.jsonl", model="other")
    with pytest.raises(ValueError, match=r"was recorded with the checkpoint other, not with digest$"):
        replay(path, fleet_of(CROWDED))


def test_without_a_placement_there_is_nothing_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no placement yet"):
        replay(write_trace(tmp_path / "t.jsonl"), fleet_of(None))
