"""Public models that can be sized by name: of their configs the keys that sizes follow from, in `cluster/sizing/configs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"


def known_models() -> tuple[str, ...]:
    """The names of the models' repositories."""
    return tuple(path.stem for path in sorted(CONFIGS.glob("*.json")))


def find_model(part: str) -> str:
    """The one known model whose name contains `part`, whatever its case; raises ValueError if it is not one."""
    models = known_models()
    found = [model for model in models if part.lower() in model.lower()] if part else []
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"the model {part!r} could be {' or '.join(found)}")
    raise ValueError(f"the model {part!r} is no file or directory here, and none of {', '.join(models)}")


def known_config(part: str) -> dict[str, Any]:
    """The config of the model that `find_model` finds."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{find_model(part)}.json").read_text())
    return config
