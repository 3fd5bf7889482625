"""A `CheckpointFamily` loads and checks the checkpoint of a model; each family adds its names and its layers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from model import kernels
from model.blocks.embedding import Embedding
from model.blocks.expert_bank import ExpertBank, Experts, LocalExperts
from model.blocks.linear import Linear
from model.blocks.mixer import Mixer, ResidualBlock
from model.blocks.norm import RMSNorm
from model.checkpoint import Checkpoint
from model.configs.expert_shape import MATRIX_NAMES, ExpertShape
from model.configs.model_config import ModelConfig
from model.configs.weight_format import WeightFormat
from model.state import Batch, State
from model.stored_matrix import StoredMatrix

log = logging.getLogger(__name__)


class BackboneModule(nn.Module, ABC):
    """A `BackboneModule` is a `LanguageModel` made of PyTorch modules.

    `lm_head` is None if the head has no weights of its own, and uses the embeddings.
    """

    config: ModelConfig
    embeddings: Embedding
    lm_head: Linear | None

    def pack(self, dtype: torch.dtype) -> None:
        """Copy the weights into the CPU kernels' layout.

        From then on, activations are fp32, and the rows that go to the experts are `dtype`.
        """
        self.embeddings.pack(is_tied=self.lm_head is None)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.pack(dtype)
        for module in self.modules():
            if isinstance(module, Linear | RMSNorm):
                module.pack()

    @property
    @abstractmethod
    def has_drafts(self) -> bool:
        """Return True if `draft` may be called."""

    @abstractmethod
    def commit(self, batch: Batch, num_accepted: Sequence[int], state: State) -> None:
        """Advance recurrent state over accepted drafts, as `LanguageModel.commit` says."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden vectors: (..., D) -> fp32 (..., V)."""
        if self.lm_head is None:
            return self.embeddings.logits(hidden)
        logits: Tensor = self.lm_head(hidden)
        return logits.float()

    @abstractmethod
    def draft(self, batch: Batch, hidden_TD: Tensor, state: State) -> Tensor:
        """Run the draft module for one step, as `LanguageModel.draft` says."""


class CheckpointFamily(ABC):
    """A `CheckpointFamily` is a `ModelFamily` over the tensors of a checkpoint."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ()  # ends of the names of parameters that are always fp32

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    @abstractmethod
    def config(self) -> ModelConfig:
        """Return the checked config."""

    @property
    @abstractmethod
    def has_mtp(self) -> bool:
        """Return True if the config asks for an MTP module and the checkpoint has its weights."""

    @abstractmethod
    def tensor_name(self, parameter_name: str) -> str:
        """Return the name in the checkpoint of the tensor for a parameter of the family's module."""

    @abstractmethod
    def expert_name(self, layer: int, expert: int, matrix: str) -> str:
        """Return the name in the checkpoint of the weight of one of an expert's matrices, such as "up"."""

    @abstractmethod
    def is_ignored(self, name: str) -> bool:
        """Return True if the checkpoint's tensor `name` is known, but not served."""

    @abstractmethod
    def make_module(self, experts: Experts, has_own_head: bool) -> BackboneModule:
        """Return the module with uninitialised parameters on PyTorch's current device."""

    @cached_property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """Return the shapes of all MoE layers for which the checkpoint has weights, with their weight formats."""
        shapes = self.config.expert_shapes
        served = shapes if self.has_mtp else tuple(s for s in shapes if s.layer < self.config.num_layers)
        return tuple(replace(shape, formats=self._expert_formats(shape)) for shape in served)

    def _expert_formats(self, shape: ExpertShape) -> tuple[WeightFormat, ...]:
        names = MATRIX_NAMES[shape.kind]
        formats = tuple(self.checkpoint.weight_format(self.expert_name(shape.layer, 0, name)) for name in names)
        return () if set(formats) == {"plain"} else formats

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer, as `ModelFamily` says."""
        found = dict.fromkeys([*self.config.eos_token_ids, self.checkpoint.tokenizer_eos_id])
        return tuple(token_id for token_id in found if token_id is not None and token_id < self.config.vocab_size)

    def load_expert(self, layer: int, expert: int) -> dict[str, StoredMatrix]:
        """Read the matrices of one routed expert as the checkpoint stores them.

        Raises ValueError if the model has no such expert, if its format differs from the format of expert 0 of the
        layer, or if a code is NaN.
        """
        shape = next((shape for shape in self.expert_shapes if shape.layer == layer), None)
        if shape is None or not 0 <= expert < shape.num_experts:
            raise ValueError(f"the model has no expert {expert} in layer {layer}")
        self._check_expert(shape, expert)
        return {
            matrix.name: self.checkpoint.matrix(
                self.expert_name(layer, expert, matrix.name), (matrix.rows, matrix.columns)
            )
            for matrix in shape.matrices
        }

    def _check_expert(self, shape: ExpertShape, expert: int) -> None:
        """Check the headers of an expert's tensors; raise ValueError as `load_expert` does."""
        for matrix in shape.matrices:
            name = self.expert_name(shape.layer, expert, matrix.name)
            format = self.checkpoint.matrix_format(name, (matrix.rows, matrix.columns))
            if format != matrix.format:
                other = self.expert_name(shape.layer, 0, matrix.name)
                formats = f"has the format {format}, and {other} has the format {matrix.format}"
                raise ValueError(f"tensor {name} in {self.checkpoint.path} {formats}; a layer's experts must have one")

    def load_local_experts(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> LocalExperts:
        """Load every routed expert into this process."""
        banks = {}
        for shape in self.expert_shapes:
            bank = banks[shape.layer] = ExpertBank(shape, dtype, device)
            for expert in range(shape.num_experts):
                # The bank finds the gain by the kind of the experts from the numbers that it computes with. A shard
                # finds the same gain in the same way, so local and remote sums are rounded to the same unit.
                bank.load(expert, self.load_expert(shape.layer, expert))
        return LocalExperts(banks)

    def load_backbone(self, experts: Experts, dtype: torch.dtype, device: torch.device | str = "cpu") -> BackboneModule:
        """Load the model without reading its routed experts; the loaded model calls `experts` to run routed experts.

        Plain weights have `dtype`, except for the family's `fp32_parameters`, with which the reference implementation
        computes in fp32. The CPU kernels compute with the exact numbers of quantized weights; elsewhere, quantized
        weights are rounded to `dtype`. Raises ValueError if a tensor is missing, is unknown or has the wrong shape.
        """
        with torch.device("meta"):
            module = self.make_module(experts, self._has_own_head())
        is_compiled = kernels.is_compiled(device)
        weights: dict[str, Tensor] = {}
        kept: dict[Linear, StoredMatrix] = {}
        rounded: list[str] = []
        for name, stored in self._backbone_weights(module):
            owner = module.get_submodule(name.rpartition(".")[0])
            if stored.format != "plain" and is_compiled and isinstance(owner, Linear):
                kept[owner] = stored
            else:
                is_quantized = stored.format != "plain"
                is_fp32 = name.endswith(self.fp32_parameters) or (is_quantized and is_compiled)
                own = torch.float32 if is_fp32 else dtype
                if is_quantized and own != torch.float32:
                    rounded.append(name)
                weights[name] = stored.dequantized().to(device, own, copy=True)
        for linear, stored in kept.items():
            linear.keep_stored(stored)
        for note in self.checkpoint.notes:
            log.info(note)
        if rounded:
            text = "%d quantized weights, among them %s, are dequantized and rounded to %s."
            log.info(text, len(rounded), rounded[0], str(dtype).removeprefix("torch."))
        module.load_state_dict(weights, assign=True)
        module = module.requires_grad_(False).eval()
        if is_compiled:
            module.pack(dtype)
        return module

    def check(self) -> None:
        """Check the names, shapes and formats of all tensors, from the headers of the files.

        No numbers are read, so NaN among the codes of a quantized weight is found only when the weight is loaded.
        """
        with torch.device("meta"):
            module = self.make_module(LocalExperts({}), self._has_own_head(reads_weights=False))
        parameters = module.state_dict()
        self._check_names(parameters)
        for name, value in parameters.items():
            tensor_name, shape = self.tensor_name(name), tuple(value.shape)
            if name.endswith(".weight") and len(shape) == 2:
                self.checkpoint.matrix_format(tensor_name, (shape[0], shape[1]))
            else:
                self.checkpoint.check_plain(tensor_name, shape)
        for experts in self.expert_shapes:
            for expert in range(experts.num_experts):
                self._check_expert(experts, expert)

    def plain_notes(self, device: torch.device | str) -> tuple[str, ...]:
        """Return a sentence about each kind of block that the compiled kernels of `device` do not support."""
        if not kernels.is_compiled(device):
            return ()
        with torch.device("meta"):
            module = self.make_module(LocalExperts({}), self._has_own_head(reads_weights=False))
        parts = dict.fromkeys(mixer.plain_part for mixer in module.modules() if isinstance(mixer, Mixer))
        return tuple(kernels.plain_note(*part) for part in parts if part is not None)

    def _backbone_weights(self, module: nn.Module) -> Iterator[tuple[str, StoredMatrix]]:
        """Yield (parameter name, memory-mapped weight) for every parameter of the model without its routed experts."""
        parameters = module.state_dict()
        self._check_names(parameters)
        for name, value in parameters.items():
            tensor_name, shape = self.tensor_name(name), tuple(value.shape)
            if name.endswith(".weight") and len(shape) == 2:
                yield name, self.checkpoint.matrix(tensor_name, (shape[0], shape[1]))
            else:
                yield name, StoredMatrix.plain(self.checkpoint.plain_tensor(tensor_name, shape))

    def _check_names(self, parameter_names: Iterable[str]) -> None:
        """Raise ValueError with the name of the first tensor that is missing in the checkpoint or unknown."""
        checkpoint = self.checkpoint
        _ = checkpoint.declared_formats  # raises ValueError if a config file names a format that is not supported
        expected = {self.tensor_name(name) for name in parameter_names}
        for shape in self.expert_shapes:
            for expert in range(shape.num_experts):
                expected.update(self.expert_name(shape.layer, expert, matrix.name) for matrix in shape.matrices)
        names = {name for name in checkpoint.names if name in expected or not self.is_ignored(name)}
        names -= checkpoint.companions
        if missing := sorted(expected - names):
            total = f"{len(missing)} missing in all"
            raise ValueError(f"the checkpoint {checkpoint.path} has no tensor {missing[0]} ({total})")
        if extra := sorted(names - expected):
            total = f"{len(extra)} in all"
            raise ValueError(f"the checkpoint {checkpoint.path} has the unknown tensor {extra[0]} ({total})")

    def _has_own_head(self, reads_weights: bool = True) -> bool:
        """Return True if the head has weights of its own, and does not use the embeddings.

        If the config ties head and embeddings but the checkpoint has weights for both, the head's own weights are
        served if they differ, as transformers does. If they are equal, they are read only once. If `reads_weights` is
        False, the weights are not compared, and are taken to differ.
        """
        head, embeddings = (self.tensor_name(name) for name in ("lm_head.weight", "embeddings.weight"))
        if not self.config.tie_word_embeddings or head not in self.checkpoint:
            return not self.config.tie_word_embeddings
        formats = {self.checkpoint.weight_format(name) for name in (head, embeddings)}
        if not reads_weights or formats != {"plain"}:
            return True
        return not torch.equal(self.checkpoint.tensor(head), self.checkpoint.tensor(embeddings))
