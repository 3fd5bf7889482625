"""`TokenizeBody`, `TokenizeChatBody` and `DetokenizeBody` are the bodies of vLLM's `/tokenize` and `/detokenize`."""

from __future__ import annotations

from services.gateway.chat.tools import ToolUse
from services.gateway.generation_request import GenerationRequest
from services.gateway.limits import GatewayLimits
from services.gateway.openai.messages import ConversationBody
from services.gateway.request_body import BaseBody, parse_json, validate


class TokenizeBody(BaseBody):
    """A `TokenizeBody` is the body of a request to `/tokenize` with a prompt that is a string."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None  # None: true
    return_token_strs: bool | None = None

    @property
    def adds_special_tokens(self) -> bool:
        return self.add_special_tokens is not False

    def request(self) -> GenerationRequest:
        """Return a `GenerationRequest` that holds only the prompt to tokenize."""
        return GenerationRequest(self.prompt)


class TokenizeChatBody(ConversationBody):
    """A `TokenizeChatBody` is the body of a request to `/tokenize` with a conversation."""

    model: str | None = None
    add_special_tokens: bool | None = None  # None: false
    return_token_strs: bool | None = None

    @property
    def adds_special_tokens(self) -> bool:
        return self.add_special_tokens is True

    def request(self) -> GenerationRequest:
        """Return a `GenerationRequest` that holds only the conversation to tokenize and its tools.

        Raises ApiError or ValueError if the conversation is invalid.
        """
        return GenerationRequest(self.conversation(), tool_use=ToolUse(self.offered_tools()))


class DetokenizeBody(BaseBody):
    """A `DetokenizeBody` is the body of a request to `/detokenize`."""

    model: str | None = None
    tokens: list[int]


def parse_tokenize_body(data: bytes, limits: GatewayLimits) -> TokenizeBody | TokenizeChatBody:
    """Return the body `data` of a request to `/tokenize`. Raises ApiError for the first mistake."""
    value = parse_json(data, limits)
    is_chat = isinstance(value, dict) and "messages" in value
    return validate(TokenizeChatBody, value) if is_chat else validate(TokenizeBody, value)
