"""`serve_faults` checks `serveConfigV2` against Serve's schema and our arguments, and tries the config's imports.

The CRD accepts any string as `serveConfigV2`. Serve's models ignore unknown keys: if a key were misspelt, Serve would
use the default of the setting without a message. Unknown keys are therefore faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from services.app import GRPC_SERVICERS
from services.args import AppArgs
from tests.k8s.manifests import Manifest


def serve_faults(config: Manifest) -> list[str]:
    return [
        *_errors(ServeDeploySchema, config, "serveConfigV2"),
        *unknown_keys(ServeDeploySchema, config),
        *(fault for each in config.get("applications", ()) for fault in _errors(AppArgs, each.get("args"), "args")),
        *import_faults(config),
        *servicer_faults(config),
    ]


def _errors(model: type[BaseModel], value: Any, name: str) -> list[str]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        return [f"{name}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return []


def unknown_keys(model: type[BaseModel], value: Any, path: str = "") -> list[str]:
    """Return a fault for each key in `value` that is not a field of `model`. Nested models are checked too."""
    if not isinstance(value, dict):
        return []
    fields = {name: field for key, field in model.model_fields.items() for name in {key, field.alias or key}}
    faults = [f"{path}{key} is no field of {model.__name__}" for key in value if key not in fields]
    for key, inner in value.items():
        for nested in _models(fields[key].annotation) if key in fields else ():
            items = inner if isinstance(inner, list) else [inner]
            for i, item in enumerate(items):
                where = f"{path}{key}.{i}." if isinstance(inner, list) else f"{path}{key}."
                faults += unknown_keys(nested, item, where)
    return faults


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield each pydantic model in an annotation, such as X in `X`, `X | None`, `list[X]` or `dict | X`.

    A plain dict is no model, so it may have any key.
    """
    if get_origin(annotation) is None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
    else:
        for argument in get_args(annotation):
            yield from _models(argument)


def import_faults(config: Manifest) -> list[str]:
    """Return a fault for each application or gRPC servicer whose path `module:name` cannot be imported."""
    paths = [each["import_path"] for each in config.get("applications", ()) if "import_path" in each]
    faults = []
    for path in [*paths, *config.get("grpc_options", {}).get("grpc_servicer_functions", ())]:
        module, _, name = path.partition(":")
        try:
            getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            faults.append(f"{path} cannot be imported: {error}")
    return faults


def servicer_faults(config: Manifest) -> list[str]:
    """Return a fault if the gRPC servicers in the config are not those of `GRPC_SERVICERS`."""
    named = config.get("grpc_options", {}).get("grpc_servicer_functions", [])
    return [] if sorted(named) == sorted(GRPC_SERVICERS) else [f"servicers are {named}, and not {GRPC_SERVICERS}"]
