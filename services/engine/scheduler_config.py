"""What the scheduler has to share out, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.prefix_cache import CacheConfig


@dataclass(frozen=True)
class SchedulerConfig:
    """Memory and limits. `chunk_align`: a prompt is split only at multiples of it (the model's scan chunk).

    `num_checkpoint_slots` more slots than requests there may be hold saved states; `checkpoint_align` divides the
    lengths within a prompt at which states are saved, `checkpoint_interval` is the most tokens between them. Bytes are
    what the prefix cache weighs; `bytes_per_slot` 0 means that the model has no recurrent state.
    """

    num_slots: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_batch_tokens: int = 2048
    max_waiting: int = 256
    chunk_align: int = 1
    checkpoint_align: int = 1
    checkpoint_interval: int = 1024
    num_checkpoint_slots: int = 0
    bytes_per_slot: int = 1
    bytes_per_block: int = 1
    has_prefix_cache: bool = True
    turn_end_ids: frozenset[int] = frozenset()
    max_draft_tokens: int = 0

    def __post_init__(self) -> None:
        can_be_0 = {"num_checkpoint_slots", "bytes_per_slot", "bytes_per_block", "max_draft_tokens", "has_prefix_cache"}
        for name, value in vars(self).items():
            least = 0 if name in can_be_0 else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}.")
        least = self.num_slots + self.chunk_align
        if self.max_batch_tokens < least:
            raise ValueError(
                f"max_batch_tokens must be at least num_slots + chunk_align = {least}, not {self.max_batch_tokens}: "
                "otherwise running requests could keep a prompt waiting for ever."
            )

    @property
    def max_len(self) -> int:
        """Tokens of the longest request: the model's context, or what all pages hold together."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def cache(self) -> CacheConfig:
        return CacheConfig(
            self.block_size,
            self.bytes_per_slot,
            self.bytes_per_block,
            self.checkpoint_align,
            self.checkpoint_interval,
            self.turn_end_ids,
            self.has_prefix_cache,
        )
