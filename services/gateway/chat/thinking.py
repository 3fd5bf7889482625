"""A `Thinking` says whether the model may reason before its answer, and for how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.gateway.chat.conversation import RESERVED_KWARGS

OFF = ("none", "minimal")  # values of reasoning_effort that switch reasoning off
BUDGETS = {"low": 512, "medium": 2048, "high": 8192, "xhigh": 32_768, "max": None}  # tokens; None: no limit
EFFORTS = (*OFF, *BUDGETS)
SWITCHES = ("enable_thinking", "thinking")  # arguments of chat templates that switch reasoning on and off


@dataclass(frozen=True)
class Thinking:
    """A `Thinking` holds a client's parameters for reasoning; the REST APIs and the gRPC API share their rules.

    A value that is not allowed, or values that contradict each other, raise a ValueError that names the parameter.

    - `effort`: the client's `reasoning_effort`. "none" and "minimal" switch reasoning off. All other values switch
      reasoning on with a budget, which is at most half of the tokens that the answer may have.
    - `token_budget`: the client's `thinking_token_budget`, used as given; -1 means no limit.
    - `enable_thinking`: the client's own switch.
    """

    effort: str | None = None
    token_budget: int | None = None
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.effort is not None and self.effort not in EFFORTS:
            allowed = f"{', '.join(map(repr, EFFORTS[:-1]))} or {EFFORTS[-1]!r}"
            raise ValueError(f"reasoning_effort must be {allowed}, not {self.effort!r:.100}.")
        if self.token_budget is not None and self.token_budget < -1:
            raise ValueError(f"thinking_token_budget must be at least 0, or -1 for no limit, not {self.token_budget}.")
        if self.enable_thinking is not None and self.enable_thinking is not self.is_enabled:
            switch = str(self.enable_thinking).lower()
            raise ValueError(f"reasoning_effort must not be {self.effort!r} if enable_thinking is {switch}.")
        self._check_budget(self.is_enabled, "enable_thinking is false" if self.effort is None else "")

    @property
    def is_enabled(self) -> bool | None:
        """Return True if the model must reason, False if it must not, and None if the chat template decides."""
        return self.enable_thinking if self.effort is None else self.effort not in OFF

    def template_kwargs(self, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the arguments of the chat template: `kwargs`, which the client gave, and the arguments for reasoning.

        Raises ValueError if `kwargs` holds an argument that the server sets, or contradicts the other parameters.
        """
        given = dict(kwargs or {})
        if reserved := sorted(given.keys() & RESERVED_KWARGS):
            raise ValueError(f"chat_template_kwargs must not hold {reserved[0]!r}, which the server itself sets.")
        if self.effort is not None:
            given.setdefault("reasoning_effort", self.effort)
        for switch in SWITCHES:
            if self.is_enabled is None:
                self._check_budget(given.get(switch), f"{switch} in chat_template_kwargs is false")
            elif given.get(switch, self.is_enabled) is not self.is_enabled:
                param = "enable_thinking" if self.effort is None else "reasoning_effort"
                raise ValueError(f"{param} must not contradict {switch} in chat_template_kwargs; set only one.")
        return given if self.is_enabled is None else given | {"enable_thinking": self.is_enabled}

    def budget(self, room: int) -> int | None:
        """Return the maximum number of tokens of reasoning, or None for no limit.

        `room` is the maximum number of tokens of reasoning and answer together.
        """
        if self.token_budget is not None:
            return None if self.token_budget == -1 else self.token_budget
        budget = BUDGETS.get(self.effort or "")
        return None if budget is None else min(budget, room // 2)

    def _check_budget(self, is_enabled: object, reason: str) -> None:
        if is_enabled is False and self.token_budget is not None:
            reason = reason or f"reasoning_effort is {self.effort!r}"
            raise ValueError(f"thinking_token_budget may not be given if {reason}.")
