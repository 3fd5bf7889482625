"""These tests run a real Redis server with the command in the StatefulSet, and check the server's configuration."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.control.embedded_redis import find_server
from tests.k8s.manifests import SECRET_VALUE, Manifests, container, named, pods
from tests.services.application import free_port


@contextmanager
def running(manifests: Manifests, owner: str, folder: Path, port: int) -> Iterator[None]:
    """Run the command of a Redis container until the body ends.

    The server listens on `port`, and its files are in `folder` instead of the container's volumes.
    """
    config = folder / "valkey.conf"
    volumes = next(each.spec["volumes"] for each in pods(manifests) if each.owner == owner)
    name = next(volume["configMap"]["name"] for volume in volumes if "configMap" in volume)
    config.write_text(named(manifests, "ConfigMap", name)["data"]["valkey.conf"].replace("/data", str(folder)))
    values = {"/etc/valkey/valkey.conf": str(config), "$(REDISCLI_AUTH)": SECRET_VALUE}
    arguments = [values.get(argument, argument) for argument in container(manifests, owner)["args"]]
    assert set(values.values()) <= set(arguments)
    with subprocess.Popen([find_server(), *arguments, "--port", str(port)], stdout=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.terminate()


def client(port: int, password: str | None) -> redis.Redis:
    connected = redis.Redis(port=port, password=password, socket_timeout=30, retry=Retry(NoBackoff(), 0))
    stop_at = time.monotonic() + 60
    while time.monotonic() < stop_at:
        try:
            connected.ping()
            break
        except redis.AuthenticationError:
            break
        except redis.ConnectionError:
            time.sleep(0.05)
    return connected


@pytest.mark.parametrize("owner", ["StatefulSet expertmesh-redis", "StatefulSet gcs-expertmesh-redis"])
def test_redis_asks_for_the_password_and_keeps_what_it_had(
    owner: str, rendered: Callable[[str], Manifests], tmp_path: Path
) -> None:
    manifests, port = rendered("gpu-ha"), free_port()
    start = partial(running, manifests, owner, tmp_path, port)
    with start(), client(port, SECRET_VALUE) as trusted, client(port, None) as unknown:
        trusted.set("placement", "7")
        assert trusted.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        with pytest.raises(redis.AuthenticationError):
            unknown.get("placement")
    with start(), client(port, SECRET_VALUE) as trusted:
        assert trusted.get("placement") == b"7"
