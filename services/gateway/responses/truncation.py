"""`fit` drops the oldest messages of a conversation that is too long, for `truncation: "auto"`."""

from __future__ import annotations

from dataclasses import replace

from services.gateway.chat.conversation import ChatMessage, Conversation
from services.gateway.generation import Generation
from services.gateway.generation_request import GenerationRequest


async def fit(generation: Generation, request: GenerationRequest, max_output_tokens: int | None) -> GenerationRequest:
    """Return `request`; a conversation that leaves no room for its answer loses its oldest messages.

    A conversation that fits keeps all its messages. A shortened conversation leaves room for `max_output_tokens`, or
    for a quarter of the model's context if there is no limit, but at most for half of the context. A system message at
    the start of the conversation and the last message always stay. A tool's output stays only together with its call.
    """
    longest = generation.card.max_model_len
    limit = max_output_tokens or -1  # -1 means no limit, as everywhere
    room = min(limit if limit > 0 else longest // 4, longest // 2)
    if await _num_tokens(generation, request) < longest:
        return request
    assert isinstance(request.prompt, Conversation)
    messages = request.prompt.messages
    num_kept = int(messages[0].role == "system")
    starts = [n for n in range(num_kept + 1, len(messages)) if messages[n].role != "tool"]
    low, high = 0, len(starts) - 1
    if high < 0:
        return request
    while low < high:  # find the first start from which the rest of the conversation fits
        middle = (low + high) // 2
        shorter = _from(request, request.prompt, num_kept, starts[middle])
        if await _num_tokens(generation, shorter) + room <= longest:
            high = middle
        else:
            low = middle + 1
    # Templates expect a user's message first, so the kept part begins with such a message, if one follows.
    first = next((n for n in starts[low:] if messages[n].role == "user"), starts[low])
    return _from(request, request.prompt, num_kept, first)


def _from(request: GenerationRequest, whole: Conversation, num_kept: int, first: int) -> GenerationRequest:
    messages: tuple[ChatMessage, ...] = (*whole.messages[:num_kept], *whole.messages[first:])
    return replace(request, prompt=replace(whole, messages=messages))


async def _num_tokens(generation: Generation, request: GenerationRequest) -> int:
    return await generation.num_tokens(request, generation.card.max_model_len)
