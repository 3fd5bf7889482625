"""A `ModelConfig` tells the engine, the planner and `expertmesh size` what a model of any family consists of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

from model.configs.config_keys import ConfigKeys
from model.configs.expert_shape import ExpertShape
from model.configs.matrix_group import MatrixGroup
from model.configs.model_files import CONFIG, GENERATION_CONFIG
from model.configs.state_spec import StateSpec


class ModelConfig(Protocol):
    """A `ModelConfig` holds the checked values of a model's `config.json` and `generation_config.json`."""

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the head, which may be more than the tokenizer has tokens."""

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden vectors."""

    @property
    def max_position_embeddings(self) -> int:
        """Return the longest context in tokens for which the model was trained."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Return True if the head uses the weights of the embeddings."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the end tokens of both configs; `ModelFamily.eos_token_ids` adds the tokenizer's."""

    @property
    def num_layers(self) -> int:
        """Return the number of layers without the MTP module. The MTP module has the next numbers."""

    @property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """Return the shapes of all MoE layers, the MTP module's layers included, as if all matrices were plain."""

    @property
    def n_group(self) -> int:
        """Return the number of groups into which a router divides the experts of its layer."""

    @property
    def topk_group(self) -> int:
        """Return the number of groups from which a token's experts come."""

    @property
    def matrices(self) -> tuple[MatrixGroup, ...]:
        """Return all weights of the model, routed experts and MTP module included."""

    @property
    def state_spec(self) -> StateSpec:
        """Return the spec of the state of all layers, the MTP module's layers included."""

    @property
    def chunk_align(self) -> int:
        """Return the number of tokens at whose multiples a prompt may be split between steps in plain PyTorch.

        The compiled CPU kernels can split a prompt at every token.
        """

    @property
    def replay_width(self) -> int:
        """Return the number of fp32 values per token that all recurrent layers keep of a step with drafts.

        From these values `commit` computes the state after the accepted drafts.
        """


class CommonValues(TypedDict):
    """`CommonValues` are the values that the configs of all families have under the same keys."""

    vocab_size: int
    hidden_size: int
    num_nextn_predict_layers: int
    norm_topk_prob: bool
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]


def common_values(keys: ConfigKeys, generation: Mapping[str, Any] | None) -> CommonValues:
    """Return the checked values that all families share; `generation` is the content of `generation_config.json`."""
    return CommonValues(
        vocab_size=keys.need("vocab_size"),
        hidden_size=keys.need("hidden_size"),
        num_nextn_predict_layers=keys.whole("num_nextn_predict_layers", 0),
        norm_topk_prob=keys.flag("norm_topk_prob", True),
        max_position_embeddings=keys.need("max_position_embeddings"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        eos_token_ids=eos_token_ids({GENERATION_CONFIG: generation or {}, CONFIG: keys.raw}),
    )


def eos_token_ids(configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the end-of-sequence ids of all `configs`, by file name, without repetition.

    The two files of a model often differ: `config.json` has the end of a text and `generation_config.json` the end of a
    turn. The model may write either.
    """
    found: list[int] = []
    for file, config in configs.items():
        given = config.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise ValueError(f"{file} has eos_token_id = {given!r}; allowed are a token id or a list of token ids")
        found += ids
    return tuple(dict.fromkeys(found))
