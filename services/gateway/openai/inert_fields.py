"""The fields in this file are known to OpenAI's or vLLM's API and have no effect on an answer of this server.

A hint is accepted with any value of its type. A field that would change the answer is accepted only with the values
that leave the answer unchanged, and every other value is refused; see `only`.

Source: OpenAI's API reference for completions and chat completions, and vLLM's `CompletionRequest` and
`ChatCompletionRequest`. null stands for a missing field.
"""

from __future__ import annotations

from typing import Annotated, Any

from services.gateway.request_body import BaseBody, Integer, Metadata, only


class InertFields(BaseBody):
    """The `InertFields` are the fields without effect that completions and chats have in common."""

    # hints of OpenAI's API
    metadata: Metadata | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None
    verbosity: str | None = None
    # hints of vLLM's API
    return_mm_kwargs: bool | None = None
    return_token_offsets: bool | None = None
    session_id: str | None = None
    spaces_between_special_tokens: bool | None = None  # byte-level tokenizers never add spaces
    stream_interval: Integer | None = None
    # fields of vLLM's API that would change the answer
    allowed_token_ids: Annotated[list[Integer] | None, only()] = None
    bad_words: Annotated[list[str] | None, only([])] = None
    ec_transfer_params: Annotated[dict[str, Any] | None, only({})] = None
    kv_transfer_params: Annotated[dict[str, Any] | None, only({})] = None
    length_penalty: Annotated[float | None, only(1.0)] = None
    logprob_token_ids: Annotated[list[Integer] | None, only()] = None
    repetition_detection: Annotated[dict[str, Any] | None, only()] = None
    return_tokens_as_token_ids: Annotated[bool | None, only(False)] = None
    routed_experts_prompt_start: Annotated[Integer | None, only(0)] = None
    truncation_side: Annotated[str | None, only("left")] = None
    use_beam_search: Annotated[bool | None, only(False)] = None
    vllm_xargs: Annotated[dict[str, Any] | None, only({})] = None
    watermarking: Annotated[bool | None, only(False)] = None


class InertCompletionFields(InertFields):
    """The `InertCompletionFields` are all fields without effect of a body for `/v1/completions`."""

    suffix: Annotated[str | None, only("")] = None
    add_special_tokens: Annotated[bool | None, only(True)] = None
    prompt_embeds: Annotated[Any, only([])] = None
    thinking_token_budget: Annotated[Integer | None, only(-1)] = None


class InertChatFields(InertFields):
    """The `InertChatFields` are all fields without effect of a body for `/v1/chat/completions`."""

    # fields of OpenAI's API that would change the answer
    audio: Annotated[dict[str, Any] | None, only()] = None
    modalities: Annotated[list[str] | None, only(["text"])] = None
    moderation: Annotated[dict[str, Any] | None, only()] = None
    web_search_options: Annotated[dict[str, Any] | None, only()] = None
    # fields of vLLM's API that would change the answer
    add_special_tokens: Annotated[bool | None, only(False)] = None
    chat_template: Annotated[str | None, only()] = None
    documents: Annotated[list[Any] | None, only([])] = None
    echo: Annotated[bool | None, only(False)] = None
    media_io_kwargs: Annotated[dict[str, Any] | None, only({})] = None
    mm_processor_kwargs: Annotated[dict[str, Any] | None, only({})] = None
    return_prompt_text: Annotated[bool | None, only(False)] = None
