from __future__ import annotations

import pytest

from model.blocks.attention import causal_attention
from tests.model import oracles
from tests.model.steps import relative_error, seeded


@pytest.mark.parametrize(("num_new", "num_all"), [(1, 1), (1, 9), (9, 9), (4, 9)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_the_plain_softmax(num_new: int, num_all: int, num_heads: int, num_kv_heads: int) -> None:
    randn = seeded(0)
    q = randn(num_new, num_heads, 8)
    k, v = randn(num_all, num_kv_heads, 8), randn(num_all, num_kv_heads, 8)
    assert relative_error(causal_attention(q, k, v), oracles.attention(q, k, v)) < 1e-5
