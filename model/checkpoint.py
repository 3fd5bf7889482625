"""A `Checkpoint` reads a Hugging Face model directory: `config.json` and the weights in safetensors files.

The weights are one file, or many files with an index. The files are memory-mapped, and only the requested tensors are
read. A missing tensor raises ValueError with the tensor's name. Weights may be quantized; see
`model/configs/weight_tensors.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.configs.declared_formats import DeclaredFormats
from model.configs.model_files import CONFIG, GENERATION_CONFIG, INDEX, QUANTIZATION, SINGLE, read_index, read_json
from model.configs.weight_format import StoredPart, WeightFormat
from model.configs.weight_tensors import (
    IGNORED_SCALES,
    SCALES,
    TensorHeader,
    check_layout,
    check_part,
    module_of,
    weight_format,
    weight_parts,
)
from model.stored_matrix import StoredMatrix

T = TypeVar("T")


def check_codes(path: Path, name: str, codes: Tensor) -> None:
    """Raise ValueError if one of a quantized weight's codes or scales is not a finite number."""
    if codes.dtype == torch.float8_e4m3fn:
        if codes.numel() and bool((codes.view(torch.uint8) & 0x7F).max() == 0x7F):
            raise ValueError(f"tensor {name} in {path} has a code 0x7F or 0xFF (NaN in e4m3); allowed are numbers only")
    elif codes.is_floating_point() and not bool(codes.isfinite().all()):
        raise ValueError(f"tensor {name} in {path} has a scale that is NaN or infinite; allowed are numbers only")


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
        return read_json(self.path / CONFIG)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.path / GENERATION_CONFIG
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
    def _files(self) -> Mapping[str, str]:
        """Return a dictionary from each tensor's name to the name of the file that holds the tensor."""
        if (files := read_index(self.path)) is not None:
            return files
        if not (self.path / SINGLE).exists():
            raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    @cached_property
    def digest(self) -> str:
        """Return the checkpoint's identity: a digest of the configs and of the weight files' names and sizes."""
        files = sorted((path.name, path.stat().st_size) for path in self.path.glob("*.safetensors"))
        quantization = (self.path / QUANTIZATION).read_text() if (self.path / QUANTIZATION).exists() else ""
        text = json.dumps(self.config, sort_keys=True) + quantization + str(files)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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

    def _read(self, name: str, read: Callable[[Any], T]) -> T:
        """Return what `read` returns for the opened file that holds the tensor called `name`."""
        if name not in self._files:
            raise ValueError(f"the checkpoint {self.path} has no tensor {name}")
        file = self._file(self._files[name])
        try:
            return read(file)
        except SafetensorError:
            raise ValueError(f"{self.path / self._files[name]} lacks the tensor {name} that the index names") from None

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read the tensor called `name` in its stored dtype and, if `shape` is given, check the tensor's shape.

        Raises ValueError if the tensor is missing or has another shape, or if its file is damaged or has changed.
        """

        def read(file: Any) -> Tensor:
            self._check_size(self._files[name])
            tensor: Tensor = file.get_tensor(name)
            return tensor

        tensor = self._read(name, read)
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"tensor {name} in {self.path} is {list(tensor.shape)}, the config requires {list(shape)}")
        return tensor

    def header(self, name: str) -> TensorHeader:
        """Return the dtype and the shape of the tensor called `name`, which were read when its file was opened.

        Raises ValueError if the tensor is missing, or if its file is damaged.
        """
        part = self._read(name, lambda file: file.get_slice(name))
        return TensorHeader(part.get_dtype(), tuple(part.get_shape()))

    @cached_property
    def companions(self) -> frozenset[str]:
        """Return the names of the scales that belong to weights, and of the scales that are ignored.

        Raises ValueError if the checkpoint has a layout of quantized weights that is not supported.
        """
        for name in self._files:
            check_layout(self.path, name)
        return frozenset(self._scales(SCALES)) | self.ignored_scales

    @cached_property
    def ignored_scales(self) -> frozenset[str]:
        """Return the names of the scales of activations and of the KV cache, which are not used."""
        return frozenset(self._scales(IGNORED_SCALES))

    def _scales(self, suffixes: Collection[str]) -> Iterator[str]:
        """Yield the names that end in one of `suffixes` and belong to a module that has a weight."""
        for name in self._files:
            module, _, suffix = name.rpartition(".")
            if suffix in suffixes and f"{module}.weight" in self._files:
                yield name

    def weight_format(self, name: str) -> WeightFormat:
        """Return the format of the weight called `name`, which the tensors that are present decide.

        Raises ValueError if the weight is missing, or if no format has the weight's dtype and scales.
        """
        if name not in self._files:
            _ = self.companions  # raises the sentence about another layout, which is the better one
        scales = [scale for scale in SCALES if f"{module_of(name)}.{scale}" in self._files]
        return weight_format(self.path, name, self.header(name).dtype, scales)

    def check_plain(self, name: str, shape: tuple[int, ...]) -> None:
        """Check the header of a tensor that cannot be quantized; raise ValueError as `matrix_format` does."""
        format = self.weight_format(name)
        if format != "plain":
            raise ValueError(f"tensor {name} in {self.path} has the format {format}; only matrices may be quantized")
        check_part(self.path, name, StoredPart("weight", "plain", shape), self.header(name), format)

    def plain_tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor that cannot be quantized; raise ValueError as `tensor` and `check_plain` do."""
        self.check_plain(name, shape)
        return self.tensor(name)

    def matrix_format(self, name: str, shape: tuple[int, int]) -> WeightFormat:
        """Return the format of the weight called `name`, and check the headers of the weight and of its scales.

        `shape` has the weight's numbers of outputs and inputs. Raises ValueError as `weight_format` does, or if a
        tensor has a wrong shape or dtype. No numbers are read.
        """
        format = self.weight_format(name)
        for part_name, part in weight_parts(self.path, name, format, shape).items():
            check_part(self.path, part_name, part, self.header(part_name), format)
        return format

    def matrix(self, name: str, shape: tuple[int, int]) -> StoredMatrix:
        """Map the weight called `name` with its scales, as the checkpoint stores them, into memory.

        Raises ValueError as `matrix_format` does, or if a code or a scale is NaN.
        """
        format = self.matrix_format(name, shape)
        tensors = []
        for part_name, part in weight_parts(self.path, name, format, shape).items():
            tensor = self.tensor(part_name)
            if format != "plain":
                check_codes(self.path, part_name, tensor)
            tensors.append(tensor.float().reshape(part.shape) if part.dtype == "float32" else tensor)
        return StoredMatrix(format, tuple(tensors))

    @cached_property
    def declared_formats(self) -> tuple[DeclaredFormats, ...]:
        """Return what the config files say of the formats; raise ValueError if a format is not supported."""
        file = self.path / QUANTIZATION
        modelopt = (DeclaredFormats.of_modelopt(read_json(file), file.name),) if file.exists() else ()
        return DeclaredFormats.of_config(self.config), *modelopt

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Return sentences about the quantization that whoever starts the model should know.

        Raises ValueError as `weight_format` and `declared_formats` do.
        """
        notes = []
        if self.ignored_scales:
            num = Counter("inputs" if name.endswith(".input_scale") else "KV cache" for name in self.ignored_scales)
            counts = " and ".join(f"{num[kind]:,} scales of the {kind}" for kind in sorted(num, reverse=True))
            notes.append(f"{counts} are ignored, because activations and the KV cache are not quantized.")
        for declared in self.declared_formats:
            others = [module for module, format in self._stored_formats() if declared.contradicts(module, format)]
            if others:
                weights = f"{len(others):,} weights, among them {others[0]}"
                sentence = f"{declared.file} declares other formats than the tensors have for {weights}"
                notes.append(f"Warning: {sentence}; the tensors decide.")
        return tuple(notes)

    def _stored_formats(self) -> Iterator[tuple[str, WeightFormat]]:
        """Yield (module, format) for each matrix of the checkpoint."""
        for name in self._files:
            if name.endswith(".weight") and len(self.header(name).shape) == 2:
                yield module_of(name), self.weight_format(name)
