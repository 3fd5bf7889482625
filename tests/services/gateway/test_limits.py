from __future__ import annotations

import re

import pytest

from services.gateway.limits import BODY_BYTES_PER_TOKEN, MIN_BODY_BYTES, MIN_TOKENIZE_TOKENS, GatewayLimits


def test_settings_change_only_what_they_name() -> None:
    limits = GatewayLimits.parse(["body_s=2.5", "connections = 7"])
    assert (limits.body_s, limits.connections) == (2.5, 7)
    assert limits.model_dump(exclude={"body_s", "connections"}) == GatewayLimits().model_dump(
        exclude={"body_s", "connections"}
    )


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("body_s", "a limit must be given as NAME=VALUE, such as body_s=30, not as 'body_s'"),
        ("body=1", "there is no limit 'body'; the limits are body_bytes, json_depth, "),
        ("body_s=soon", "the limit body_s must be a valid number, not 'soon'"),
        ("body_s=0", "the limit body_s must be greater than 0, not '0'"),
        ("connections=1.5", "the limit connections must be a valid integer, not '1.5'"),
        ("json_depth=", "the limit json_depth must be a valid integer, not ''"),
    ],
)
def test_a_wrong_setting_is_one_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        GatewayLimits.parse(["header_s=1", setting])


def test_a_body_may_hold_the_whole_context() -> None:
    assert GatewayLimits().max_body_bytes(1000) == MIN_BODY_BYTES
    assert GatewayLimits().max_body_bytes(1 << 20) == BODY_BYTES_PER_TOKEN << 20
    assert GatewayLimits(body_bytes=5000).max_body_bytes(1 << 20) == 5000


def test_a_body_may_hold_a_token_id_for_each_token_of_the_context_and_other_fields() -> None:
    assert GatewayLimits().for_context(1000).json_items == 1 << 20
    assert GatewayLimits().for_context(1 << 20).json_items > (1 << 20) + 1000
    assert GatewayLimits(json_items=5000).for_context(1 << 20).json_items == 5000


def test_the_whole_context_may_be_tokenized() -> None:
    assert GatewayLimits().max_tokenize_tokens(1000) == MIN_TOKENIZE_TOKENS
    assert GatewayLimits().max_tokenize_tokens(1 << 20) == 1 << 20
    assert GatewayLimits(tokenize_tokens=5000).max_tokenize_tokens(1 << 20) == 5000
