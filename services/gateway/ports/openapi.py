"""`document` makes `/openapi.json` and `/docs` describe the real request bodies, and `takes` declares a route's body.

The routes read and check their bodies themselves, so that every error is one sentence. FastAPI therefore does not know
the bodies' classes.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

COMPONENTS = "#/components/schemas/{model}"
ADMIN_KEY = "admin_key"  # name of the security scheme of the operator's API
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string", "description": "what was wrong, and what is allowed"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the parameter that was wrong"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "An error", "content": {"application/json": {"schema": ERROR}}}
}
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or its events if the request has stream=true",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def takes(*kinds: type[BaseModel], is_required: bool = True, streams: bool = False) -> dict[str, Any]:
    """Return the arguments of `add_api_route` for a route whose body is of one of the classes `kinds`.

    If `streams` is True, the response may be a stream of server-sent events.
    """
    schemas = [_schema(kind) for kind in kinds]
    content = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
    body = {"requestBody": {"required": is_required, "content": content}}
    return {"openapi_extra": body, "responses": EVENT_STREAM if streams else {}}


@cache  # making the schemas of all routes takes 0.1 s, and several routes take the same class
def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    return kind.model_json_schema(ref_template=COMPONENTS)


def document(app: FastAPI) -> None:
    """Let `app` describe the bodies that its routes declare with `takes`; routes may be added later."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI's documentation recommends


def _described(app: FastAPI) -> dict[str, Any]:
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = described.setdefault("components", {})
    components["securitySchemes"] = {ADMIN_KEY: {"type": "http", "scheme": "bearer"}}
    schemas = components.setdefault("schemas", {})
    for path, operations in described["paths"].items():
        for operation in operations.values():
            _add_path_parameters(path, operation)
            for media in operation.get("requestBody", {}).get("content", {}).values():
                media["schema"] = _named(media["schema"], schemas)
    return described


def _add_path_parameters(path: str, operation: dict[str, Any]) -> None:
    """Add the parameters of `path` that FastAPI does not know, because the route reads them from the request."""
    parameters = operation.get("parameters", [])
    known = {parameter["name"] for parameter in parameters}
    unknown = [name for name in re.findall(r"{(\w+)}", path) if name not in known]
    if unknown:
        schema = {"type": "string"}
        added = [{"name": name, "in": "path", "required": True, "schema": schema} for name in unknown]
        operation["parameters"] = [*parameters, *added]


def _named(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Move a schema and the schemas that it refers to into `schemas`, and return a reference to the schema."""
    if "anyOf" in schema and "title" not in schema:
        return {"anyOf": [_named(member, schemas) for member in schema["anyOf"]]}
    rest = {key: value for key, value in schema.items() if key != "$defs"}
    schemas.update(schema.get("$defs", {}))
    schemas[rest["title"]] = rest
    return {"$ref": COMPONENTS.format(model=rest["title"])}
