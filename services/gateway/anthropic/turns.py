"""`MessageTurn`s are the messages of Anthropic's Messages API; `conversation` converts them for the chat template.

Source: Anthropic's API reference for messages, and the types of the `anthropic` client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall
from services.gateway.request_body import BaseBody
from services.gateway.schema.json_text import dumps


class ContentBlock(BaseBody):
    """A `ContentBlock` is a part of a message. Unknown fields, such as `citations`, and `cache_control` are ignored."""

    model_config = ConfigDict(extra="ignore")


class TextBlock(ContentBlock):
    type: Literal["text"]
    text: str


class ThinkingBlock(ContentBlock):
    type: Literal["thinking"]  # the block's signature is not checked
    thinking: str


class RedactedThinkingBlock(ContentBlock):
    type: Literal["redacted_thinking"]  # nobody but Anthropic can read the block's data


class ToolUseBlock(ContentBlock):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(ContentBlock):
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


class MessageTurn(ContentBlock):
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


def text_of(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def conversation(
    system: str | Sequence[TextBlock] | None, turns: Sequence[MessageTurn], template_kwargs: Mapping[str, Any]
) -> Conversation:
    """Return the conversation with the system prompt `system` and the messages `turns`.

    If the last message is the assistant's, the answer continues its text, or its reasoning if it has no text. Raises
    ValueError if a message is invalid.
    """
    messages = [ChatMessage("system", text_of(system))] if system else []
    for n, turn in enumerate(turns):
        for message in turn.messages(f"messages[{n}]"):
            if messages and messages[-1].role == message.role != "tool":
                messages[-1] = _merged(messages[-1], message)
            else:
                messages.append(message)
    is_continued = bool(turns) and turns[-1].role == "assistant"
    if is_continued and messages[-1].tool_calls:
        raise ValueError(
            f"messages[{len(turns) - 1}].content must not hold a tool_use block if it is the last message; the results "
            "of tools must follow in a message of the role 'user'."
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


def _merged(first: ChatMessage, second: ChatMessage) -> ChatMessage:
    """Return one message with the content of two neighbours of the same role, because templates expect turns.

    The blocks of an assistant are joined without a line end, because they are pieces of one text of the model.
    """
    texts = [message.content for message in (first, second) if message.content is not None]
    content = ("" if first.role == "assistant" else "\n").join(texts) if texts else None
    calls = first.tool_calls + second.tool_calls
    return replace(first, content=content, reasoning=first.reasoning + second.reasoning, tool_calls=calls)
