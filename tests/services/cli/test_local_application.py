from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, DeploymentStatusTrigger

from services.cli.local_application import bind_port, failures, held_port
from services.cli.start_steps import SHARDS
from tests.services.application import free_port

IN_USE = r"^--port \d+ is in use; choose another port or stop the process that uses it$"


def gateway(port: int) -> socket.socket:
    """Return a listening socket that is opened like the REST port of a gateway."""
    return socket.create_server(("127.0.0.1", port), reuse_port=True)


def stop_with_a_connection(server: socket.socket) -> None:
    """Close `server` after one connection, which the server closes first and which then stays in TIME_WAIT."""
    with socket.create_connection(server.getsockname()) as client:
        server.accept()[0].close()
        assert client.recv(1) == b""
    server.close()


@pytest.mark.parametrize("is_after_a_stop", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_an_application_holds_its_port_from_its_start_to_its_end(is_after_a_stop: bool, host: str) -> None:
    port = free_port()
    if is_after_a_stop:
        stop_with_a_connection(gateway(port))
    with held_port("--port", port), ExitStack() as gateways:
        for _ in range(3):  # no gateway yet, one gateway, and a gateway with its replacement
            with pytest.raises(ValueError, match=IN_USE):
                bind_port("--port", port, host)
            gateways.enter_context(gateway(port))
    bind_port("--port", port, host).close()


def test_connections_reach_only_the_gateway_of_a_held_port() -> None:
    port = free_port()
    with held_port("--port", port), gateway(port) as server:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                server.settimeout(5)
                accepted, address = server.accept()
                accepted.close()
                assert address == client.getsockname()


@pytest.mark.parametrize("reuse_port", [False, True])
def test_the_port_of_another_server_is_in_use(reuse_port: bool) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=reuse_port) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=IN_USE), held_port("--port", port):
            pass
    with held_port("--port", port):
        pass


def test_a_server_that_has_just_stopped_leaves_its_port_free() -> None:
    port = free_port()
    stop_with_a_connection(socket.create_server(("127.0.0.1", port)))
    with held_port("--port", port), gateway(port):
        pass


def test_an_address_of_another_machine_is_not_called_in_use() -> None:
    with pytest.raises(ValueError, match=r"^--port 8000 cannot be used \(.*requested address\); choose another port$"):
        bind_port("--port", 8000, "192.0.2.1")


@pytest.mark.parametrize("failed", ["experts-a", "experts-b"])
def test_the_reason_of_one_pool_is_kept_whatever_the_others_do(failed: str) -> None:
    names = ("gateway", "experts-a", "experts-b")
    deployments = {
        name: DeploymentStatusOverview(
            status=DeploymentStatus.UPDATING,
            status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
            replica_states={},
            message="It failed. Error:\nValueError: no memory" if name == failed else "",
        )
        for name in names
    }
    assert failures(deployments) == {SHARDS: "no memory"}
