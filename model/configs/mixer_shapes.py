"""The shapes here hold the sizes of a model's mixers, the layers through which the tokens of a sequence interact."""

from __future__ import annotations

from dataclasses import dataclass

from model.configs.state_spec import PagedSpec, RecurrentSpec


@dataclass(frozen=True)
class AttentionShape:
    """An `AttentionShape` holds the sizes of one attention layer."""

    hidden_size: int
    num_heads: int  # H
    num_kv_heads: int  # J
    head_dim: int  # D

    def state_spec(self, layer: int) -> PagedSpec:
        """Return the spec of the attention layer's state: each token's key and value, (2, J, D)."""
        return PagedSpec(layer, (2, self.num_kv_heads, self.head_dim))


@dataclass(frozen=True)
class MambaShape:
    """A `MambaShape` holds the sizes of one Mamba-2 mixer."""

    hidden_size: int
    num_heads: int  # H
    head_dim: int  # D
    num_groups: int  # G
    state_dim: int  # N
    conv_kernel: int  # K
    chunk_size: int  # Q
    delta_limit: tuple[float, float] = (0.0, float("inf"))

    @property
    def inner_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner_dim + 2 * self.num_groups * self.state_dim  # C

    @property
    def replay_width(self) -> int:
        """Return the number of values per token that the mixer keeps of a step with drafts: the gate, x|B|C and Δ."""
        return self.inner_dim + self.conv_dim + self.num_heads

    def state_spec(self, layer: int) -> RecurrentSpec:
        """Return the spec of the mixer's state: the last K-1 convolution inputs, and the SSM state in fp32."""
        shapes = ((self.conv_kernel - 1, self.conv_dim), (self.num_heads, self.head_dim, self.state_dim))
        return RecurrentSpec(layer, shapes, ("model", "float32"))


@dataclass(frozen=True)
class MLAShape:
    """An `MLAShape` holds the sizes of one layer with MLA, which is attention over a compressed latent."""

    hidden_size: int
    num_heads: int  # H
    query_rank: int | None  # None: the queries have one projection instead of two
    kv_rank: int
    nope_dim: int  # numbers of a query or a key that have no position
    rope_dim: int  # numbers of a query or a key that are rotated
    value_dim: int

    def state_spec(self, layer: int) -> PagedSpec:
        """Return the spec of the layer's state: each token's latent, which is normed, and its one rotated key."""
        return PagedSpec(layer, (self.kv_rank + self.rope_dim,))


@dataclass(frozen=True)
class DeltaNetShape:
    """A `DeltaNetShape` holds the sizes of one Gated DeltaNet mixer."""

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head
    value_dim: int  # of a head
    conv_kernel: int  # K

    @property
    def keys_dim(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def values_dim(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def conv_dim(self) -> int:
        return 2 * self.keys_dim + self.values_dim  # C

    @property
    def replay_width(self) -> int:
        """Return the number of values per token that the mixer keeps of a step with drafts: q|k|v, β and the decay."""
        return self.conv_dim + 2 * self.num_value_heads

    def state_spec(self, layer: int) -> RecurrentSpec:
        """Return the spec of the mixer's state: the last K-1 convolution inputs, and the state by value and key."""
        shapes = ((self.conv_kernel - 1, self.conv_dim), (self.num_value_heads, self.value_dim, self.key_dim))
        return RecurrentSpec(layer, shapes, ("model", "float32"))
