"""The names of the files in a Hugging Face model directory, and the functions that read its JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
QUANTIZATION = "hf_quant_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # one file of weights, or an index of many files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises ValueError if the file is missing, cannot be read, is not valid JSON or holds no object.
    """
    try:
        value = json.loads(path.read_text(), object_hook=_read_special_float)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a model directory: it has no {path.name}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} cannot be read: it is not a text file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_index(directory: Path) -> Mapping[str, str] | None:
    """Return the name of the file that holds each tensor, by the tensor's name; None if `directory` has no index.

    A directory without an index holds all tensors in the file SINGLE. Raises ValueError if the index cannot be read.
    """
    path = directory / INDEX
    if not path.exists():
        return None
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{path} has no weight_map")
    return files


def _read_special_float(value: dict[str, Any]) -> Any:
    """Return a JSON object as it is, but {"__float__": "Infinity"}, as transformers writes infinity, as a float."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
