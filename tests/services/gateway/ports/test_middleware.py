from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from services.gateway.generation import Generation
from services.gateway.health import Health
from services.gateway.operator.admin import add_admin
from services.gateway.rest import build_rest
from tests.services.gateway.echo import serving

ORIGIN = "https://chat.example.org"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}


@pytest.fixture
def page(generation: Generation) -> Iterator[httpx.Client]:
    """Yield a client that sends the header Origin, as a web page of the allowed origin does."""

    async def ready() -> Health:
        return Health(is_ready=True)

    app = build_rest(generation, ready, allowed_origins=[ORIGIN])
    add_admin(app, "secret-key", None)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("on purpose")

    with serving(app) as url, httpx.Client(base_url=url, headers={"Origin": ORIGIN}) as client:
        yield client


def allowed(answer: httpx.Response) -> str | None:
    return answer.headers.get("access-control-allow-origin")


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/metrics", "/v1/nothing", "/v1/models/other", "/openapi.json"]
)
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type" if get.content else "date"]
    if path != "/metrics":  # the metrics change with each request
        assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize(
    ("method", "path", "methods"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/tokenize", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/ping", "GET, HEAD, POST"),
        ("PATCH", "/v1/responses/resp_1", "DELETE, GET, HEAD"),
        ("OPTIONS", "/v1/models/echo", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_which_are_right(http: httpx.Client, method: str, path: str, methods: str) -> None:
    answer = http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == methods
    if method != "HEAD":
        assert answer.json()["error"]["message"] == f"{path} must be requested with {methods}, not {method}."


def test_pages_of_an_allowed_origin_may_call(page: httpx.Client) -> None:
    preflight = page.options("/v1/chat/completions", headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert allowed(preflight) == ORIGIN
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "x-a"
    answer = page.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert allowed(answer) == ORIGIN
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_errors_may_be_read_by_pages_too(page: httpx.Client) -> None:
    refused: list[Any] = [
        page.post("/v1/completions", json={"prompt": 1}),
        page.get("/v1/completions"),
        page.get("/nothing"),
        page.get("/broken"),
    ]
    assert [answer.status_code for answer in refused] == [400, 405, 404, 500]
    for answer in refused:
        assert allowed(answer) == ORIGIN
        assert answer.headers["x-request-id"]
        assert answer.json()["error"]["message"]


def test_other_pages_may_not_call(page: httpx.Client, http: httpx.Client) -> None:
    other = {"Origin": "https://evil.example.org"}
    assert page.options("/v1/completions", headers=PREFLIGHT | other).status_code == 400
    assert allowed(page.get("/v1/models", headers=other)) is None
    assert http.options("/v1/completions", headers=PREFLIGHT).status_code == 405  # no origin is allowed by default
    assert allowed(http.get("/v1/models", headers=PREFLIGHT)) is None


def test_no_page_may_call_the_operators_api(page: httpx.Client) -> None:
    preflight = page.options("/admin/rebalance", headers=PREFLIGHT)
    assert preflight.status_code == 405
    assert allowed(preflight) is None
    assert allowed(page.get("/admin/plan", headers={"Authorization": "Bearer secret-key"})) is None
