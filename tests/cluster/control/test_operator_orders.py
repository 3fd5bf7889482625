from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.control.operator_orders import MAX_SHARDS, OrderKind, StandingOrder, scale_targets, with_drain_orders
from tests.cluster.fleet import make_shard

DRAIN = StandingOrder(OrderKind.DRAIN, "s01", by="ada", at=3.5)
SCALE = StandingOrder(OrderKind.SCALE, "experts-cpu", 4)


def test_orders_are_read_back_as_they_were_written() -> None:
    for order in (DRAIN, SCALE, StandingOrder(OrderKind.REBALANCE)):
        assert StandingOrder.from_json(order.to_json()) == order


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "drian"}', '{"kind": "drain", "subject": "s", "how": 1}'])
def test_what_is_no_order_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="is not one that Expertmesh wrote"):
        StandingOrder.from_json(text)


@pytest.mark.parametrize(
    ("kind", "subject", "count", "sentence"),
    [
        (OrderKind.DRAIN, "", 0, "An order to drain has the name ''; .* needs the name of a shard or pool"),
        (OrderKind.REBALANCE, "s01", 0, "and an order to rebalance must not have a name"),
        (OrderKind.SCALE, "p", 0, "The number of shards is 0; it must be from 1 to 1,000,000."),
        (OrderKind.SCALE, "p", MAX_SHARDS + 1, "it must be from 1 to "),
        (OrderKind.DRAIN, "s01", 2, "The number of shards is 2"),
    ],
)
def test_an_order_that_makes_no_sense_is_one_sentence(kind: OrderKind, subject: str, count: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        StandingOrder(kind, subject, count)


def test_a_planner_sees_the_shards_as_ordered() -> None:
    shards, orders = [make_shard(0), make_shard(1)], {order.name: order for order in (DRAIN, SCALE)}
    assert with_drain_orders(shards, orders) == [shards[0], replace(shards[1], draining=True)]
    assert with_drain_orders(shards, {}) == shards
    assert scale_targets(orders) == {"experts-cpu": 4}
