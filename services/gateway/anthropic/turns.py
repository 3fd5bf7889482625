"""A `MessageTurns` holds the system prompt and messages of Anthropic's API, and converts them to a `Conversation`.

Source: Anthropic's API reference for messages, and the types of the `anthropic` client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field

from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall
from services.gateway.request_body import BaseBody, LenientBody
from services.gateway.schema.json_text import dumps


class TextBlock(LenientBody):
    type: Literal["text"]
    text: str


class ThinkingBlock(LenientBody):
    type: Literal["thinking"]  # the block's signature is not checked
    thinking: str


class RedactedThinkingBlock(LenientBody):
    type: Literal["redacted_thinking"]  # only Anthropic can read the block's data


class ToolUseBlock(LenientBody):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(LenientBody):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


AnyBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
# types of blocks that a message of each role may hold
BLOCKS_OF: Mapping[str, tuple[str, ...]] = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


class MessageTurn(LenientBody):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]

    def messages(self, param: str) -> Iterator[ChatMessage]:
        """Yield the messages for the chat template; each result of a tool is a message of its own.

        Raises ValueError for a block that does not fit the role; the message names the parameter `param`.
        """
        if isinstance(self.content, str):
            yield ChatMessage(self.role, self.content)
            return
        allowed = BLOCKS_OF[self.role]
        for n, block in enumerate(self.content):
            if block.type not in allowed:
                types = ", ".join(map(repr, allowed))
                raise ValueError(f"{param}.content[{n}].type must be one of {types} in this role, not {block.type!r}.")
        if not self.content:
            yield ChatMessage(self.role, "")
        yield from map(self._message, self.content)

    def _message(self, block: AnyBlock) -> ChatMessage:
        match block:
            case TextBlock():
                return ChatMessage(self.role, block.text)
            case ThinkingBlock():
                return ChatMessage(self.role, None, reasoning=block.thinking)
            case ToolUseBlock():
                return ChatMessage(self.role, None, tool_calls=(PastCall(block.id, block.name, dumps(block.input)),))
            case ToolResultBlock():
                text = text_of(block.content or "")
                return ChatMessage("tool", f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id)
        return ChatMessage(self.role, None)


class MessageTurns(BaseBody):
    """A `MessageTurns` holds the fields of a request that make the conversation."""

    messages: list[MessageTurn]
    system: str | list[TextBlock] | None = None

    def conversation(self, template_kwargs: Mapping[str, Any]) -> Conversation:
        """Return the conversation for the chat template.

        If the last message is the assistant's, the answer continues its text, or its reasoning if it has no text.
        Raises ValueError if a message is invalid.
        """
        messages = _merged(self._unmerged())
        is_continued = bool(self.messages) and self.messages[-1].role == "assistant"
        if is_continued and messages[-1].tool_calls:
            raise ValueError(
                f"messages[{len(self.messages) - 1}].content must not hold a tool_use block if it is the last message; "
                "the results of tools must follow in a message of the role 'user'."
            )
        if is_continued and not (messages[-1].content or messages[-1].reasoning):
            messages.pop()  # an empty message leaves nothing to continue
            is_continued = False
        return Conversation(
            tuple(messages),
            template_kwargs=template_kwargs,
            add_generation_prompt=not is_continued,
            continue_final_message=is_continued,
        )

    def _unmerged(self) -> Iterator[ChatMessage]:
        if self.system:
            yield ChatMessage("system", text_of(self.system))
        for n, turn in enumerate(self.messages):
            yield from turn.messages(f"messages[{n}]")


def num_parts(value: object) -> int:
    """Return the number of messages and content blocks in `value`, an unchecked list of a request."""
    if not isinstance(value, list):
        return 0
    return len(value) + sum(num_parts(part.get("content")) for part in value if isinstance(part, dict))


def text_of(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _merged(messages: Iterable[ChatMessage]) -> list[ChatMessage]:
    """Join adjacent messages of the same role into one message, because templates expect the roles to alternate.

    The results of tools stay separate messages.
    The blocks of an assistant are joined without a line end, because they are pieces of one text of the model.
    """
    merged: list[ChatMessage] = []
    for role, run in groupby(messages, lambda message: message.role):
        if role == "tool":
            merged += run
            continue
        parts = list(run)
        texts = [part.content for part in parts if part.content is not None]
        content = ("" if role == "assistant" else "\n").join(texts) if texts else None
        calls = tuple(call for part in parts for call in part.tool_calls)
        merged.append(ChatMessage(role, content, reasoning="".join(part.reasoning for part in parts), tool_calls=calls))
    return merged
