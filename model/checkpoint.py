"""A `Checkpoint` reads a Hugging Face model directory: `config.json` and the weights in safetensors files.

The weights are one file, or many files with an index. The files are memory-mapped, and only the requested tensors are
read. A missing tensor raises ValueError with the tensor's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.configs.weight_format import WeightFormat
from model.stored_matrix import StoredMatrix

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    transformers writes infinite numbers as {"__float__": "Infinity"}; the function turns such objects into floats.
    Raises ValueError if the file is missing, is not valid JSON or holds no object.
    """

    def as_float(value: dict[str, Any]) -> Any:
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    try:
        value = json.loads(path.read_text(), object_hook=as_float)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a model directory: it has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


class Checkpoint:
    """A `Checkpoint` gives access to the config and the tensors of the model directory `path`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"the model path {self.path} is not a directory")
        self._open: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return read_json(path) if path.exists() else {}

    @cached_property
    def tokenizer_eos_id(self) -> int | None:
        """Return the id of the tokenizer's `eos_token`; None if there is no tokenizer, or if it has no such token."""
        paths = [self.path / "tokenizer_config.json", self.path / "special_tokens_map.json"]
        given = next((token for path in paths if path.exists() if (token := read_json(path).get("eos_token"))), None)
        name = given.get("content") if isinstance(given, dict) else given
        if not name or not (self.path / "tokenizer.json").exists():
            return None
        tokenizer = read_json(self.path / "tokenizer.json")
        added = (token["id"] for token in tokenizer.get("added_tokens") or () if token["content"] == name)
        token_id = next(added, None)
        vocab = (tokenizer.get("model") or {}).get("vocab")
        return vocab.get(name) if token_id is None and isinstance(vocab, dict) else token_id

    @cached_property
    def _files(self) -> dict[str, str]:
        """Return a dictionary from each tensor's name to the name of the file that holds the tensor."""
        if (self.path / INDEX).exists():
            files = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(files, dict):
                raise ValueError(f"{self.path / INDEX} has no weight_map")
            return files
        if not (self.path / SINGLE).exists():
            raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    @cached_property
    def digest(self) -> str:
        """Return the checkpoint's identity: a digest of the config and of the weight files' names and sizes."""
        files = sorted((path.name, path.stat().st_size) for path in self.path.glob("*.safetensors"))
        return hashlib.sha256((json.dumps(self.config, sort_keys=True) + str(files)).encode()).hexdigest()[:16]

    @property
    def names(self) -> Iterable[str]:
        return self._files.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            try:
                self._sizes[file_name] = (self.path / file_name).stat().st_size
                self._open[file_name] = safe_open(self.path / file_name, framework="pt")
            except FileNotFoundError:
                raise ValueError(f"{self.path} lacks the file {file_name} that the index names") from None
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / file_name} is not a readable safetensors file: {error}") from None
        return self._open[file_name]

    def _check_size(self, file_name: str) -> None:
        """Raise ValueError if a mapped file's size has changed, as reading past the file's end kills the process."""
        try:
            size = (self.path / file_name).stat().st_size
        except OSError as error:
            raise ValueError(f"{self.path / file_name} can no longer be read: {error}") from None
        if size != self._sizes[file_name]:
            sizes = f"now has {size} bytes, but had {self._sizes[file_name]} when it was opened"
            raise ValueError(f"{self.path / file_name} {sizes}; a weight file must not change while it is served")

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read the tensor called `name` in its stored dtype and, if `shape` is given, check the tensor's shape.

        Raises ValueError if the tensor is missing or has another shape, or if its file is damaged or has changed.
        """
        if name not in self._files:
            raise ValueError(f"the checkpoint {self.path} has no tensor {name}")
        file = self._file(self._files[name])
        self._check_size(self._files[name])
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError:
            raise ValueError(f"{self.path / self._files[name]} lacks the tensor {name} that the index names") from None
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"tensor {name} in {self.path} is {list(tensor.shape)}, the config requires {list(shape)}")
        return tensor

    @property
    def companions(self) -> frozenset[str]:
        """Return the names of the scales that belong to the weights."""
        return frozenset()

    def weight_format(self, name: str) -> WeightFormat:
        """Return the format of the weight called `name`, which the tensors that are present decide."""
        return "plain"

    def matrix(self, name: str, shape: tuple[int, int]) -> StoredMatrix:
        """Read the weight called `name` with its scales, as the checkpoint stores them.

        `shape` has the weight's numbers of outputs and inputs. Raises ValueError as `tensor` does.
        """
        return StoredMatrix.plain(self.tensor(name, shape))
