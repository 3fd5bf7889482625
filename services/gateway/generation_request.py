"""A `GenerationRequest` is a client's request in the form that the REST and gRPC APIs pass to `Generation`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from services.engine.contract.sampling_params import Grammar
from services.gateway.chat.conversation import Conversation
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.tools import ToolMode, ToolUse

MAX_CHOICES = 128  # maximum number of choices of one client request: the number of prompts times `n`

Prompt = str | list[int] | Conversation


@dataclass(frozen=True)
class AnswerFormat:
    """An `AnswerFormat` holds the grammar of an answer's text, and the name of the parameter that set the grammar."""

    grammar: Grammar
    param: str  # name of the client's parameter for error messages, such as "structured_outputs.regex"


@dataclass(frozen=True)
class GenerationRequest:
    """A `GenerationRequest` holds one prompt and all parameters that a client set for the answers to the prompt.

    REST bodies and gRPC messages are converted to a `GenerationRequest` first. One request becomes `n` choices.
    """

    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)  # only the fields of SamplingParams that the client set
    n: int | None = None  # number of choices; None: 1
    echo: bool = False  # True: the text of an answer begins with the prompt
    answer_format: AnswerFormat | None = None
    tool_use: ToolUse = field(default_factory=ToolUse)
    timeout: float | None = None  # seconds from the arrival of the request until its last token must be generated
    thinking: Thinking = field(default_factory=Thinking)  # the budget; the conversation's template has the switch
    truncate_prompt_tokens: int | None = None  # tokens kept at the end of the prompt; -1: all that fit
    skip_special_tokens: bool = True  # False: the text of an answer shows the names of special tokens
    include_stop_str_in_output: bool = False  # True: the text of an answer ends with the stop string that ended it

    def check(self) -> None:
        """Raise ValueError if a parameter is out of its bounds or if two parameters contradict each other."""
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
        """Return the prompt; if the model may call tools, a conversation is returned with the request's tools."""
        if not isinstance(self.prompt, Conversation) or self.tool_use.mode is ToolMode.NONE:
            return self.prompt
        return replace(self.prompt, tools=tuple(tool.to_template() for tool in self.tool_use.tools))
