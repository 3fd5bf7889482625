"""A `GenerationRequest` is a client's request in the form that the REST and gRPC APIs pass to `Generation`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from services.engine.contract.sampling_params import Grammar, LogitBias, SamplingParams
from services.gateway.chat.conversation import Conversation, json_size
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.tools import ToolMode, ToolUse
from services.gateway.limits import GatewayLimits

MAX_CHOICES = 128  # maximum number of choices of one client request: the number of prompts times `n`
MAX_ID_DIGITS = 20  # a token id with more digits is no token id

Prompt = str | list[int] | Conversation


@dataclass(frozen=True)
class AnswerFormat:
    """An `AnswerFormat` holds the grammar of an answer's text, and the name of the parameter that set the grammar."""

    grammar: Grammar
    param: str  # name of the client's parameter for error messages, such as "structured_outputs.regex"


@dataclass(frozen=True)
class GenerationRequest:
    """A `GenerationRequest` holds the prompts of a client and all parameters that the client set for their answers.

    REST bodies and gRPC messages are converted to a `GenerationRequest` first. Each prompt gets `n` choices.

    `sampling` holds only the fields of SamplingParams that the client set. Unlike in SamplingParams, `max_tokens` may
    be -1 for no limit, and `logit_bias` may be a mapping from token ids, as numbers or as text, to biases.
    """

    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int | None = None  # number of choices for each prompt; None: 1
    echo: bool = False  # True: the text of an answer begins with the prompt
    answer_format: AnswerFormat | None = None
    tool_use: ToolUse = field(default_factory=ToolUse)
    timeout: float | None = None  # seconds from the arrival of the request until its last token must be generated
    thinking: Thinking = field(default_factory=Thinking)  # for the reasoning budget; `template_kwargs` has the switch
    truncate_prompt_tokens: int | None = None  # tokens kept at the end of the prompt; -1: all that fit
    skip_special_tokens: bool = True  # False: the text of an answer shows the names of special tokens
    include_stop_str_in_output: bool = False  # True: the text of an answer ends with the stop string that ended it
    more_prompts: Sequence[Prompt] = ()  # further prompts, with the same parameters

    @property
    def num_choices(self) -> int:
        return (self.n or 1) * (1 + len(self.more_prompts))

    @cached_property
    def size(self) -> int:
        """Return the cost of preparing the prompts, as the number of characters of text that take as long to tokenize.

        Above MANY_CHARS, the number is only a lower bound.
        """
        prompts = (self.prompt, *self.more_prompts)
        size = sum(prompt.size if isinstance(prompt, Conversation) else len(prompt) for prompt in prompts)
        tools = self.tool_use.tools
        return size + json_size(*((tool.name, tool.description, tool.parameters) for tool in tools))

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, Conversation)

    @property
    def is_unlimited(self) -> bool:
        """Return True if an answer without `max_tokens` may use the whole context."""
        return self.is_chat or self.sampling.get("max_tokens") == -1

    @property
    def is_prompt_only(self) -> bool:
        """Return True if the client wants nothing but the prompt, with its logprobs."""
        return self.echo and self.sampling.get("max_tokens") == 0

    def check(self, limits: GatewayLimits) -> None:
        """Raise ValueError if a parameter is out of its bounds or if two parameters contradict each other.

        The checks take little time however large the request is, and come before all other work for the request.
        """
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise ValueError(f"n must be 1 to {MAX_CHOICES}, not {self.n}.")
        if self.num_choices > MAX_CHOICES:
            raise ValueError(f"n times the number of prompts must be at most {MAX_CHOICES}, not {self.num_choices}.")
        if self.echo and self.is_chat:
            raise ValueError("echo may only be given with a plain prompt, not with messages.")
        self._check_limits(limits)
        self.tool_use.check()
        if self.answer_format and self.tool_use.is_forced:
            param = self.answer_format.param
            raise ValueError(f"{param} may not be given together with a tool_choice that forces a call.")

    def check_timeout(self) -> None:
        """Raise ValueError if the timeout is out of its bounds."""
        if self.timeout is not None and not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ValueError(f"timeout must be a number of seconds above 0, not {self.timeout}.")

    def _check_limits(self, limits: GatewayLimits) -> None:
        if isinstance(self.prompt, Conversation) and len(self.prompt.messages) > limits.messages:
            raise ValueError(f"messages must hold at most {limits.messages} messages, not {len(self.prompt.messages)}.")
        bias, stops = self.sampling.get("logit_bias", ()), self.sampling.get("stop", ())
        if len(bias) > limits.logit_bias:
            raise ValueError(f"logit_bias must hold at most {limits.logit_bias} tokens, not {len(bias)}.")
        if len(stops) > limits.stop_strings:
            raise ValueError(f"stop must hold at most {limits.stop_strings} strings, not {len(stops)}.")
        if (longest := max((len(stop.encode()) for stop in stops), default=0)) > limits.stop_bytes:
            raise ValueError(f"stop must hold strings of at most {limits.stop_bytes} bytes, not {longest}.")

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the sampling parameters, with `defaults` for what the client did not set.

        Raises ValueError if a value is not allowed.
        """
        given = {**defaults, **self.sampling}
        if given.get("max_tokens") == -1:
            del given["max_tokens"]
        if self.is_prompt_only:
            given["max_tokens"] = 1
        if isinstance(bias := given.get("logit_bias"), Mapping):
            given["logit_bias"] = LogitBias.of({_token_id(key): value for key, value in bias.items()})
        return SamplingParams(**given)

    def prompts(self) -> list[Prompt]:
        """Return all prompts; if the model may call tools, a conversation is returned with the request's tools."""
        if not isinstance(self.prompt, Conversation) or self.tool_use.mode is ToolMode.NONE:
            return [self.prompt, *self.more_prompts]
        return [replace(self.prompt, tools=tuple(tool.to_template() for tool in self.tool_use.tools))]


def _token_id(key: str | int) -> int:
    if isinstance(key, str) and not (key.strip().isdecimal() and len(key) < MAX_ID_DIGITS):
        raise ValueError(f"logit_bias must be keyed by token ids as strings, not {key!r:.100}.")
    return int(key)
