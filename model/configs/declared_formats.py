"""`DeclaredFormats` are the weight formats that a config declares, to compare them with the tensors.

Two files declare formats: `config.json` under `quantization_config`, and Model Optimizer's `hf_quant_config.json`. A
checkpoint may have both, one or none of the two. The tensors decide how a weight is read, because the declarations are
ambiguous: Model Optimizer excludes the modules below layer 1 as "layers.1*", which as a wildcard also matches layer 10.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

from model.configs.config_keys import ConfigKeys
from model.configs.model_files import CONFIG, QUANTIZATION
from model.configs.weight_format import BLOCK, GROUP, WeightFormat

ALGORITHMS: dict[str, WeightFormat] = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4"}
MIXED = "MIXED_PRECISION"
NAMES = {"fp8": "FP8", "nvfp4": "NVFP4"}  # the names that `declarations` writes
PRODUCER = {"name": "expertmesh"}
# Ends of the names of modules that have no declared format: public configs do not list them, or not in every file.
UNDECLARED = ("embeddings", "embed_tokens", "lm_head", "shared_head.head", "gate", "eh_proj", "mtp.fc")


@dataclass(frozen=True)
class DeclaredFormats:
    """`DeclaredFormats` are what one config file says of the modules' formats.

    `listed` has the formats by module where the file lists each quantized module. Otherwise, all modules have the
    format `uniform`, except those that a pattern in `excluded` matches. Both are None if the file says nothing, and if
    `is_unlisted_mix` is True: the file then says that formats are mixed, but not which module has which format.
    """

    file: str
    listed: Mapping[str, WeightFormat] | None = None
    uniform: WeightFormat | None = None
    excluded: tuple[str, ...] = ()
    is_unlisted_mix: bool = False

    @classmethod
    def of_config(cls, raw: Mapping[str, Any], file: str = CONFIG) -> DeclaredFormats:
        """Read `quantization_config` in a `config.json`; raise ValueError if it names an unsupported algorithm."""
        keys = ConfigKeys(raw, file=file).section("quantization_config")
        if not keys.raw:
            return cls(file)
        method = keys.raw.get("quant_method")
        if method == "fp8":
            if keys.raw.get("weight_block_size") != [BLOCK, BLOCK]:
                raise keys.wrong("weight_block_size", f"supported are blocks of [{BLOCK}, {BLOCK}]")
            excluded = keys.items("modules_to_not_convert", str)
            return cls(file, uniform="fp8_blocks", excluded=tuple(excluded))
        if method is None or str(method).startswith("modelopt"):
            return cls._of_modelopt(keys, "ignore")
        raise keys.wrong("quant_method", "supported are fp8 and modelopt")

    @classmethod
    def of_modelopt(cls, raw: Mapping[str, Any], file: str = QUANTIZATION) -> DeclaredFormats:
        """Read an `hf_quant_config.json`; raise ValueError if it names an unsupported algorithm."""
        return cls._of_modelopt(ConfigKeys(raw, file=file).section("quantization"), "exclude_modules")

    @classmethod
    def _of_modelopt(cls, keys: ConfigKeys, excluded_key: str) -> DeclaredFormats:
        file, name = keys.file, keys.raw.get("quant_algo")
        algorithm = None if name is None else str(name).upper()
        if algorithm not in (None, MIXED, *ALGORITHMS):
            raise keys.wrong("quant_algo", f"supported are {', '.join([*ALGORITHMS, MIXED])}")
        _check_group(keys)
        layers = keys.section("quantized_layers")
        if layers.raw:
            return cls(file, listed={module: _listed_format(module, layers) for module in layers.raw})
        if algorithm in (None, MIXED):
            return cls(file, is_unlisted_mix=algorithm == MIXED)
        return cls(file, uniform=ALGORITHMS[algorithm], excluded=tuple(keys.items(excluded_key, str)))

    def contradicts(self, module: str, format: WeightFormat) -> bool:
        """Return True if the file declares another format than `format` for `module`.

        Where a pattern can be read as a wildcard or as the name of a part of the model, either reading is right.
        """
        if format == "plain" and module.endswith(UNDECLARED):
            return False
        if self.listed is not None:
            return self.listed.get(module, "plain") != format
        if self.uniform is None:
            return False
        is_part = self._excluded_parts.match(module) is not None
        is_match = is_part or self._excluded_names.match(module) is not None
        return format not in {"plain" if is_excluded else self.uniform for is_excluded in (is_part, is_match)}

    @cached_property
    def _excluded_names(self) -> re.Pattern[str]:
        """Return an expression for the modules whose names match a pattern in `excluded` as a wildcard."""
        return _any_of(self.excluded)

    @cached_property
    def _excluded_parts(self) -> re.Pattern[str]:
        """Return an expression for the modules that a pattern in `excluded` names, and for all modules below them."""
        stems = [pattern.removesuffix("*").removesuffix(".") for pattern in self.excluded]
        return _any_of([*stems, *(f"{stem}.*" for stem in stems)])


def declarations(
    formats: Mapping[str, WeightFormat], modules: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the `quantization_config` and the content of `hf_quant_config.json` that declare `formats`.

    `modules` are all modules that could be quantized. Blocks have no `hf_quant_config.json`.
    """
    plain = ["lm_head", *sorted(set(modules) - set(formats))]
    kinds = set(formats.values())
    if kinds == {"fp8_blocks"}:
        blocks = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return {**blocks, "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": plain}, None
    shared = {"producer": PRODUCER, "quant_method": "modelopt"}
    if len(kinds) == 1:
        [algorithm] = (NAMES[kind] for kind in kinds)
        group = {"group_size": GROUP} if algorithm == "NVFP4" else {}
        inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, **group, "exclude_modules": plain}
        outer = {"quant_algo": algorithm, **group, "ignore": plain}
        return {**outer, **shared}, {"producer": PRODUCER, "quantization": inner}
    layers: dict[str, dict[str, Any]] = {
        module: {"quant_algo": NAMES[kind]} for module, kind in sorted(formats.items())
    }
    for entry in layers.values():
        if entry["quant_algo"] == "NVFP4":
            entry.update({"group_size": GROUP})
    mixed = {"quant_algo": MIXED, "quantized_layers": layers}
    hf_quant_config = {"producer": PRODUCER, "quantization": {**mixed, "kv_cache_quant_algo": None}}
    return {**mixed, "ignore": [], **shared}, hf_quant_config


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Return one expression that matches the names that any of `patterns`, which may have wildcards, matches.

    A config may exclude 200 modules, and a checkpoint may have 70,000, so each pattern alone would take half a minute.
    """
    return re.compile("|".join(map(translate, patterns)) or "(?!)")


def _listed_format(module: str, layers: ConfigKeys) -> WeightFormat:
    """Return the format of one entry of `quantized_layers`, which is an algorithm or an object that names one."""
    entry = layers.raw[module]
    name = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
    format = ALGORITHMS.get(str(name).upper())
    if format is None:
        supported = f"supported are {', '.join(ALGORITHMS)}"
        raise ValueError(f"{layers.file} lists {module} with quant_algo = {name!r}; {supported}")
    if isinstance(entry, Mapping):
        _check_group(layers.section(module))
    return format


def _check_group(keys: ConfigKeys) -> None:
    if keys.raw.get("group_size") not in (None, GROUP):
        raise keys.wrong("group_size", f"supported are groups of {GROUP}")
