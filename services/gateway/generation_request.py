"""A `GenerationRequest` is the value that both surfaces make of a request and that `Generation` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from services.engine.contract.sampling_params import Grammar
from services.gateway.chat.conversation import Conversation
from services.gateway.chat.tools import ToolMode, ToolUse

MAX_CHOICES = 128  # of one request: prompts times n

Prompt = str | list[int] | Conversation


@dataclass(frozen=True)
class AnswerFormat:
    """An `AnswerFormat` is a grammar that the text of an answer must match, and the client's parameter that sets it."""

    grammar: Grammar
    param: str  # for error messages, such as "structured_outputs.regex"


@dataclass(frozen=True)
class GenerationRequest:
    """A `GenerationRequest` holds one prompt and everything that a client asked for its answers.

    REST bodies and gRPC messages are converted to it before anything else happens. One request becomes `n` choices.
    """

    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)  # only the fields of SamplingParams that the client set
    n: int | None = None  # number of choices; None: 1
    echo: bool = False  # True: the text of an answer begins with the prompt
    answer_format: AnswerFormat | None = None
    tool_use: ToolUse = field(default_factory=ToolUse)
    timeout: float | None = None  # seconds from now to the last token

    def check(self) -> None:
        """Raise ValueError if a value is out of its bounds or two parameters contradict each other."""
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise ValueError(f"n must be 1 to {MAX_CHOICES}, not {self.n}.")
        if self.timeout is not None and not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout must be a number of seconds above 0, not {self.timeout}.")
        if self.echo and isinstance(self.prompt, Conversation):
            raise ValueError("echo may only be given with a plain prompt, not with messages.")
        self.tool_use.check()
        if self.answer_format and self.tool_use.is_forced:
            param = self.answer_format.param
            raise ValueError(f"{param} may not be given together with a tool_choice that forces a call.")

    def prompt_with_tools(self) -> Prompt:
        """Return the prompt, and show a conversation the tools unless the model may not call them."""
        if not isinstance(self.prompt, Conversation) or self.tool_use.mode is ToolMode.NONE:
            return self.prompt
        return replace(self.prompt, tools=tuple(tool.to_template() for tool in self.tool_use.tools))
