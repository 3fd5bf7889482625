"""Known models are the public models that can be sized by name.

For each known model, `cluster/sizing/configs` has a file with the keys of the model's config that determine the model's
sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.configs.model_files import read_json

CONFIGS = Path(__file__).parent / "configs"


def known_models() -> tuple[str, ...]:
    """Return the repository names of all known models, sorted."""
    return tuple(path.stem for path in sorted(CONFIGS.glob("*.json")))


def find_model(part: str) -> str:
    """Return the known model whose name contains `part`, ignoring case; raise ValueError if none or several match."""
    models = known_models()
    found = [model for model in models if part.lower() in model.lower()] if part else []
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"the model {part!r} could be {' or '.join(found)}")
    raise ValueError(f"the model {part!r} is no file or directory here, and none of {', '.join(models)}")


def known_config(part: str) -> dict[str, Any]:
    """Return the config of the known model that `find_model` finds for `part`."""
    return read_json(CONFIGS / f"{find_model(part)}.json")
