import math
from typing import Any

import pytest

from services.engine.contract.sampling_params import LogitBias, SamplingParams
from services.engine.contract.token_output import FinishReason
from services.engine.request import Request


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("max_tokens", 0, "max_tokens must be at least 1, not 0."),
        ("max_tokens", -5, "max_tokens must be at least 1, not -5."),
        ("temperature", -0.1, "temperature must be a finite number of at least 0, not -0.1."),
        ("temperature", math.nan, "temperature must be a finite number of at least 0, not nan."),
        ("temperature", math.inf, "temperature must be a finite number of at least 0, not inf."),
        ("cache_salt", "a" * 129, "cache_salt must be at most 128 characters, not 129."),
        ("cache_salt", "a\ud83d", "cache_salt must be text without halves of surrogate pairs, not 'a\\ud83d'."),
        ("top_p", -0.1, "top_p must be 0 to 1, not -0.1."),
        ("top_p", 1.5, "top_p must be 0 to 1, not 1.5."),
        ("top_k", -2, "top_k must be 1 to 2147483647, or 0 or -1 for the whole vocabulary, not -2."),
        ("top_k", 10**30, f"top_k must be 1 to 2147483647, or 0 or -1 for the whole vocabulary, not {10**30}."),
        ("seed", 2**63, f"seed must be a signed 64-bit integer, not {2**63}."),
        ("seed", -(10**30), f"seed must be a signed 64-bit integer, not {-(10**30)}."),
        ("priority", 2**31, f"priority must be a signed 32-bit integer, not {2**31}."),
        ("priority", -(10**30), f"priority must be a signed 32-bit integer, not {-(10**30)}."),
        ("min_tokens", -1, "min_tokens must be at least 0, not -1."),
        ("stop", ("a", ""), "stop must be strings of at least one character, not ''."),
        ("stop", ("a",) * 65, "stop must be at most 64 strings, not '65 strings'."),
        ("stop_token_ids", (3, -1), "stop_token_ids must be at least 0 each, not (3, -1)."),
    ],
)
def test_bad_values_are_named(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared below
        SamplingParams(**{field: value})
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("ids", "values", "sentence"),
    [
        ((1, -2), (1.0, 1.0), "logit_bias must be keyed by token ids of at least 0, not -2."),
        ((1, 2), (1.0, 100.5), "logit_bias must be -100 to 100 for each token, not 100.5."),
        ((1, 2), (math.nan, 1.0), "logit_bias must be -100 to 100 for each token, not nan."),
        ((1, 2), (1.0,), "logit_bias must be one value for each token id, not '1 for 2 ids'."),
        ((1, 1), (1.0, 2.0), "logit_bias must be one value for each token id, not '2 for 1 ids'."),
        (range(131_073), (0.0,) * 131_073, "logit_bias must be at most 131072 entries, not 131073."),
    ],
)
def test_a_bad_logit_bias_is_named(ids: Any, values: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared below
        LogitBias(tuple(ids), values)
    assert str(error.value) == sentence


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_tokens must be at most max_tokens \(3\), not 4\."):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_a_request_ends_at_a_stop_token_or_its_length() -> None:
    request = Request("r", [1, 2], SamplingParams(), seed=0, max_len=4, stop_ids=frozenset({7}))
    assert request.append(3) is None
    assert request.append(4) is FinishReason.LENGTH
    assert (request.num_prompt_tokens, request.num_generated, request.num_tokens) == (2, 2, 4)
    other = Request("s", [1], SamplingParams(), seed=0, max_len=4, stop_ids=frozenset({7}))
    assert other.append(7) is FinishReason.STOP
