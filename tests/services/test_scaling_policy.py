"""What Serve is told of a pool's size, from what its shards have heard."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingPolicy

from services.app import _autoscaling
from services.args import AppArgs, PoolArgs
from services.scaling_policy import follow_the_controller, report


@dataclass
class Heard:
    """The part of Serve's context that the policy reads: each replica's series, as Serve keeps them."""

    raw_metrics: dict[str, dict[str, list[TimeStampedValue]]] = field(default_factory=dict)
    target_num_replicas: int = 3

    def add(self, replica: str, shards: int, decided_at: float, came_at: float = 0.0) -> None:
        for name, value in report(shards, decided_at).items():
            series = self.raw_metrics.setdefault(name, {}).setdefault(replica, [])
            series.append(TimeStampedValue(came_at, value))


def test_while_nothing_was_heard_a_pool_stays_as_it_is() -> None:
    assert follow_the_controller(Heard(target_num_replicas=5)) == (5, {})
    empty: Any = {"desired_shards": {"a": []}, "decided_at": {"a": []}}
    assert follow_the_controller(Heard(empty))[0] == 3


def test_the_newest_decision_counts_whoever_heard_of_it() -> None:
    heard = Heard()
    heard.add("a", 5, decided_at=10.0, came_at=90.0)  # cut off from the store since
    heard.add("b", 5, decided_at=10.0, came_at=80.0)
    heard.add("b", 4, decided_at=20.0, came_at=81.0)
    assert follow_the_controller(heard)[0] == 4


def test_serve_takes_the_policy_by_its_name_and_by_value() -> None:
    config = _autoscaling(PoolArgs(shards=3, max_shards=5))
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (3, 3, 5)
    policy: Any = pickle.loads(pickle.dumps(AutoscalingPolicy.model_validate(config.policy))).get_policy()
    heard = Heard()
    heard.add("a", 4, time.time())
    assert policy(heard)[0] == 4
    assert config.upscale_delay_s == config.downscale_delay_s == 0


@pytest.mark.parametrize("bounds", [{"min_shards": 4}, {"max_shards": 2}, {"min_shards": 5, "max_shards": 4}])
def test_bounds_that_leave_out_the_start_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="pool experts-cpu starts with 3 shards; that must be from min_shards = "):
        AppArgs(pools=[PoolArgs(**bounds)]).check()
