from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation, ModelCard
from services.gateway.health import Health
from services.gateway.rest import build_rest
from services.gateway.server_routes import VERSION
from tests.services.gateway.echo import CHAT_TEMPLATE, EOS, EchoSource, serving


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
def test_health_as_vllm_tells_it(http: httpx.Client, health: dict[str, Health], method: str, path: str) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.content) == (200, b"")
    health["now"] = Health(is_ready=False)
    assert http.request(method, path).status_code == 503


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": VERSION}
    assert http.get("/openapi.json").json()["info"]["version"] == VERSION


def test_models_with_a_slash(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()


def test_tokenizer_info_holds_no_paths(http: httpx.Client, model_dir: Path) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["tokenizer_class"]
    assert info["eos_token"] == EOS
    assert info["chat_template"] == CHAT_TEMPLATE
    assert str(model_dir) not in json.dumps(info)


def test_tokenizer_info_of_the_demo_is_json() -> None:
    from tests.services.demo import MODEL

    text = json.dumps(Tokenizer(MODEL).info())
    assert str(MODEL) not in text
    assert "<|im_end|>" in text


def test_metrics_in_both_formats(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 3})
    http.post("/v1/completions", json={})
    plain = http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    prometheus = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    answer = http.get("/metrics", headers={"Accept": prometheus})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert answer.text.endswith("# EOF\n")
    assert answer.text.count("# EOF") == 1
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"expertmesh:request_refused", "expertmesh:steps", "expertmesh:time_to_first_token_seconds"} <= names
    assert {family.name.removesuffix("_total") for family in parse_text(plain.text)} >= names


def test_a_model_may_have_the_name_of_a_repository(source: EchoSource, tokenizer: Tokenizer) -> None:
    async def ready() -> Health:
        return Health(is_ready=True)

    generation = Generation(source, tokenizer, ModelCard("org/name", 64, 1))
    with serving(build_rest(generation, ready)) as url, httpx.Client(base_url=url) as client:
        for path in ("/v1/models/org/name", "/v1/models/org%2Fname"):
            assert client.get(path).json()["id"] == "org/name"
        answer = client.post("/v1/completions", json={"model": "org/name", "prompt": "ab"})
        assert answer.json()["model"] == "org/name"
        assert 'model_name="org/name"' in client.get("/metrics").text
