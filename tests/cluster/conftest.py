from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.control.embedded_redis import EmbeddedRedis


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url
