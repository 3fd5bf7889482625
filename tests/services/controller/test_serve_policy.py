"""Test the autoscaling policy that Serve calls: the newest decision that any shard has reported counts."""

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
from services.controller.serve_policy import MEMORY_S, follow_the_controller, report


@dataclass
class Heard:
    """A `Heard` stands for Serve's context: it keeps each replica's series of reports, as Serve does."""

    raw_metrics: dict[str, dict[str, list[TimeStampedValue]]] = field(default_factory=dict)
    target_num_replicas: int = 3
    policy_state: dict[str, Any] = field(default_factory=dict)
    current_time: float = 100.0

    def decide(self, current_time: float) -> int:
        """Call the policy as Serve does, keep the state for the next call, and return the pool's size."""
        self.current_time = current_time
        self.target_num_replicas, self.policy_state = follow_the_controller(self)
        return self.target_num_replicas

    def forget(self, replica: str) -> None:
        """Discard a replica's reports, as Serve does when it stops the replica."""
        for series in self.raw_metrics.values():
            series.pop(replica)

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
    heard.add("a", 5, decided_at=10.0, came_at=90.0)  # The shard "a" was then cut off from the store.
    heard.add("b", 5, decided_at=10.0, came_at=80.0)
    heard.add("b", 4, decided_at=20.0, came_at=81.0)
    assert follow_the_controller(heard)[0] == 4


def test_a_shard_that_is_stopped_first_does_not_take_the_decision_with_it() -> None:
    heard = Heard(target_num_replicas=4)
    for replica in "abc":
        heard.add(replica, 4, decided_at=10.0)
    assert heard.decide(100.0) == 4
    heard.add("c", 3, decided_at=11.0)
    assert heard.decide(100.1) == 3
    heard.forget("c")
    assert heard.decide(100.2) == 3
    assert heard.decide(101.0) == 3
    heard.add("a", 4, decided_at=12.0)
    assert heard.decide(101.1) == 4


def test_a_clock_that_was_set_back_is_believed_after_a_while() -> None:
    heard = Heard(target_num_replicas=4)
    heard.add("a", 4, decided_at=5000.0)
    assert heard.decide(100.0) == 4
    heard.add("a", 3, decided_at=1000.0)
    assert heard.decide(100.0 + MEMORY_S - 1) == 4
    assert heard.decide(100.0 + MEMORY_S) == 3


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
    with pytest.raises(
        ValueError, match="pool experts-cpu starts with 3 shards; the number must be from min_shards = "
    ):
        AppArgs(pools=[PoolArgs(**bounds)]).check()
