"""A `TokenUsage` counts the tokens of one request, for the `usage` field of its response."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.gateway.chat.text_delta import TextDelta


@dataclass
class TokenUsage:
    """A `TokenUsage` adds up the tokens of one request with `n` choices for each prompt.

    The tokens of a prompt are counted once and not `n` times. The generated tokens are counted for every choice.
    """

    n: int  # number of choices for each prompt
    num_prompt: dict[int, int] = field(default_factory=dict)  # tokens of each prompt, by index of the prompt
    num_cached: dict[int, int] = field(default_factory=dict)  # cached tokens of each prompt, by index of the prompt
    num_generated: dict[int, int] = field(default_factory=dict)  # tokens of each choice, by index of the choice
    num_reasoning: dict[int, int] = field(default_factory=dict)  # tokens of reasoning, by index of the choice

    def add(self, delta: TextDelta) -> None:
        """Record the token counts of `delta` in place of the earlier counts of the same choice."""
        prompt = delta.index // self.n
        if delta.index % self.n == 0 or prompt not in self.num_prompt:
            self.num_prompt[prompt], self.num_cached[prompt] = delta.num_prompt, delta.num_cached
        self.num_generated[delta.index] = delta.num_generated
        self.num_reasoning[delta.index] = delta.num_reasoning

    @property
    def prompt_tokens(self) -> int:
        return sum(self.num_prompt.values())

    @property
    def cached_tokens(self) -> int:
        return sum(self.num_cached.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self.num_generated.values())

    @property
    def reasoning_tokens(self) -> int:
        return sum(self.num_reasoning.values())
