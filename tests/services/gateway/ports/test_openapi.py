from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from services.gateway.generation import Generation
from services.gateway.health import Health
from services.gateway.openai.body import ChatBody, CompletionBody
from services.gateway.operator.admin import ScaleBody, add_admin
from services.gateway.ports.openapi import takes
from services.gateway.rest import build_rest


@pytest.fixture
def described(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def body_schema(described: dict[str, Any], path: str) -> dict[str, Any]:
    schema: dict[str, Any] = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return schema | {"components": described["components"]}


def test_every_post_route_declares_its_body(described: dict[str, Any]) -> None:
    without = {
        path
        for path, operations in described["paths"].items()
        if "post" in operations and "requestBody" not in operations["post"]
    }
    assert without <= {"/ping", "/v1/responses/{response_id}/cancel"}


def test_all_references_lead_somewhere(described: dict[str, Any]) -> None:
    names = set(re.findall(r"'#/components/schemas/([^']+)'", str(described)))
    assert names <= set(described["components"]["schemas"])
    assert "$defs" not in str(described["components"])


@pytest.mark.parametrize(("path", "kind"), [("/v1/chat/completions", ChatBody), ("/v1/completions", CompletionBody)])
def test_the_schema_has_the_fields_of_the_body(
    described: dict[str, Any], path: str, kind: type[ChatBody] | type[CompletionBody]
) -> None:
    schema = described["components"]["schemas"][kind.__name__]
    assert set(schema["properties"]) == {field.alias or name for name, field in kind.model_fields.items()}
    assert body_schema(described, path)["$ref"] == f"#/components/schemas/{kind.__name__}"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}),
        ("/v1/completions", {"prompt": "hi", "stop": ["a"]}),
        ("/v1/completions", {"prompt": [1, 2], "stop": "a"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"model": "echo", "max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_bodies_that_are_accepted_fit_the_schema(
    described: dict[str, Any], http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    assert http.post(path, json=body).status_code == 200
    Draft202012Validator(body_schema(described, path)).validate(body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": "hi"}),
        ("/v1/chat/completions", {}),
        ("/v1/completions", {"prompt": "hi", "nothing": 1}),
        ("/v1/completions", {"prompt": {}}),
        ("/detokenize", {"tokens": "a"}),
    ],
)
def test_bodies_that_do_not_fit_are_refused(
    described: dict[str, Any], http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    assert http.post(path, json=body).status_code == 400
    assert not Draft202012Validator(body_schema(described, path)).is_valid(body)


def test_every_parameter_of_a_path_is_declared(generation: Generation) -> None:
    async def ready() -> Health:
        return Health(is_ready=True)

    app = build_rest(generation, ready)
    add_admin(app, None, None)
    for path, operations in app.openapi()["paths"].items():
        for operation in operations.values():
            names = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"]
            assert names == re.findall(r"{(\w+)}", path), path


def test_errors_are_described(described: dict[str, Any], http: httpx.Client) -> None:
    schema = described["paths"]["/v1/models"]["get"]["responses"]["default"]["content"]["application/json"]["schema"]
    Draft202012Validator(schema).validate(http.get("/v1/models/other").json())
    Draft202012Validator(schema).validate(http.post("/v1/messages", json={}).json())
    assert "422" not in str(described["paths"])


def test_a_body_may_be_optional() -> None:
    assert takes(ScaleBody, is_required=False)["openapi_extra"]["requestBody"]["required"] is False


def test_the_page_needs_no_other_server(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    for link in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert http.get(link).status_code == 200, link
