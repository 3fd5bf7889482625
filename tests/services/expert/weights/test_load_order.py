"""These tests convert load orders and their results to protobuf and back; the values must not change."""

from __future__ import annotations

from services.expert.weights.load_order import LoadOrder, LoadResult, Sources, group_by_layer, keys_of


def test_an_order_survives_the_wire() -> None:
    sources = Sources({(1, 0): "a:1", (3, 7): "a:1", (1, 2): "b:2"}, {(1, 2): 2**64 - 1, (3, 7): 5})
    order = LoadOrder({1: [0, 2]}, {3: [7]}, sources)
    request = order.to_proto(epoch=4, fencing=9)
    assert (request.epoch, request.fencing) == (4, 9)
    assert LoadOrder.from_proto(request) == order


def test_a_result_survives_the_wire() -> None:
    result = LoadResult({3: -2, 1: 6}, {1: {0: 5, 2: 2**64 - 1}, 3: {7: 1}}, 100, 200)
    reply = result.to_proto()
    assert [gain.layer for gain in reply.gains] == [1, 3]
    assert LoadResult.from_proto(reply) == result


def test_keys_and_experts_by_layer_say_the_same() -> None:
    assert group_by_layer({(3, 1), (1, 9), (1, 2)}) == {1: [2, 9], 3: [1]}
    assert keys_of({1: [9, 2], 3: [1]}) == {(3, 1), (1, 9), (1, 2)}
