"""The `GatewayLimits` bound everything that a client can make large.

Every limit is checked before the work that the limit bounds is done. docs/api.md lists the limits. An operator sets
limits under `limits:` in a Serve config, or with `expertmesh up --limit NAME=VALUE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MIN_BODY_BYTES = 4 << 20  # smallest default of `body_bytes`
BODY_BYTES_PER_TOKEN = 8  # default of `body_bytes` for models with a long context
OTHER_ITEMS = 1 << 16  # items that a body may have beside a prompt of the whole context, by default
MIN_TOKENIZE_TOKENS = 65_536  # smallest default of `tokenize_tokens`


class GatewayLimits(BaseModel):
    """A `GatewayLimits` holds the limits on requests and connections of one gateway."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int | None = Field(
        None,
        ge=1 << 10,
        description="bytes of a body or gRPC message; default: 4 MiB, or 8 per token of the context",
    )
    json_depth: int = Field(128, ge=8, le=190, description="levels to which the JSON of a body may be nested")
    json_values: int = Field(65_536, ge=256, description="objects, lists and strings in the JSON of a body")
    json_items: int = Field(
        1 << 20,
        ge=256,
        description="items of all lists and objects in the JSON of a body; default: 2**20, or more for long contexts",
    )
    logit_bias: int = Field(1024, ge=0, le=1 << 17, description="entries of logit_bias")
    stop_strings: int = Field(4, ge=0, le=64, description="stop strings")
    stop_bytes: int = Field(1024, ge=1, le=1 << 16, description="bytes of one stop string")
    tokenize_tokens: int | None = Field(
        None,
        ge=1 << 10,
        description="tokens that are tokenized or detokenized; default: 65,536, or the context if that is more",
    )
    messages: int = Field(16_384, ge=16, description="messages of one chat")
    prompt_logprobs: int = Field(
        48 << 10, ge=1 << 10, description="logprobs of all prompts of a request, with alternatives, times n"
    )
    schema_nodes: int = Field(4096, ge=16, description="objects and lists in the JSON schemas of one request")
    schema_bytes: int = Field(128 << 10, ge=1 << 10, description="bytes of the JSON schemas of one request")
    input_items: int = Field(16_384, ge=16, description="items or messages of one request, and their parts")
    stored_responses: int = Field(1024, ge=0, description="responses of /v1/responses that a gateway keeps")
    stored_bytes: int = Field(64 << 20, ge=0, description="bytes of the responses that a gateway keeps")
    header_bytes: int = Field(64 << 10, ge=1 << 10, description="bytes of the headers of one request")
    header_s: float = Field(10, gt=0, description="seconds for the headers of a request to arrive")
    body_s: float = Field(60, gt=0, description="seconds for the body of a request to arrive")
    write_s: float = Field(60, gt=0, description="seconds for which a client may leave its response unread")
    connections: int = Field(2048, ge=1, description="open connections to the REST port")
    grpc_streams: int = Field(1024, ge=1, description="RPCs in flight at the gRPC port")

    @classmethod
    def parse(cls, settings: Sequence[str]) -> GatewayLimits:
        """Return the limits in which `settings` of the form NAME=VALUE replace the default values.

        Raises ValueError with one sentence about the first setting that is wrong.
        """
        given: dict[str, Any] = {}
        for setting in settings:
            name, equals, value = (part.strip() for part in setting.partition("="))
            if not equals:
                raise ValueError(f"a limit must be given as NAME=VALUE, such as body_s=30, not as {setting!r:.100}")
            if name not in cls.model_fields:
                raise ValueError(f"there is no limit {name!r:.100}; the limits are {', '.join(cls.model_fields)}")
            try:
                cls.model_validate({name: value})
            except ValidationError as error:
                expected = error.errors()[0]["msg"].removeprefix("Input should be ").partition(",")[0]
                raise ValueError(f"the limit {name} must be {expected}, not {value!r:.100}") from None
            given[name] = value
        return cls.model_validate(given)

    def for_context(self, max_model_len: int) -> GatewayLimits:
        """Return a copy whose default of `json_items` allows a prompt of `max_model_len` token ids and other fields."""
        if "json_items" in self.model_fields_set:
            return self
        return self.model_copy(update={"json_items": max(self.json_items, max_model_len + OTHER_ITEMS)})

    def max_body_bytes(self, max_model_len: int) -> int:
        """Return the maximum size of a body in bytes, for a model whose context is `max_model_len` tokens."""
        return self.body_bytes or max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * max_model_len)

    def max_tokenize_tokens(self, max_model_len: int) -> int:
        """Return how many tokens /tokenize may return and /detokenize may take, for the context `max_model_len`."""
        return self.tokenize_tokens or max(MIN_TOKENIZE_TOKENS, max_model_len)
