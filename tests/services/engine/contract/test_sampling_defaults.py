from __future__ import annotations

from typing import Any

import pytest

from services.engine.contract.sampling_defaults import SamplingDefaults


def test_the_parameters_of_the_file_are_taken_and_others_are_not() -> None:
    file = {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 1,
        "top_k": 20,
        "min_p": None,
        "repetition_penalty": 1.05,
        "max_new_tokens": 300,
        "eos_token_id": [2, 11],
        "typical_p": 0.9,
    }
    defaults = SamplingDefaults.of_model(file)
    assert defaults.values == {"temperature": 0.6, "top_p": 1, "top_k": 20, "repetition_penalty": 1.05}
    assert defaults.max_new_tokens == 300
    assert str(defaults) == "temperature 0.6, top_p 1, top_k 20, repetition_penalty 1.05"
    assert str(SamplingDefaults.of_model({"eos_token_id": 2})) == ""


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ({"temperature": "0.6"}, "generation_config.json has temperature = '0.6'; allowed is a number, or no value."),
        ({"top_p": True}, "generation_config.json has top_p = True; allowed is a number, or no value."),
        ({"top_k": 2.5}, "generation_config.json has top_k = 2.5; allowed is an integer, or no value."),
        ({"min_p": [0.1]}, "generation_config.json has min_p = [0.1]; allowed is a number, or no value."),
        ({"top_p": 2}, "generation_config.json cannot be used: top_p must be 0 to 1, not 2."),
        (
            {"max_new_tokens": 0},
            "generation_config.json has max_new_tokens = 0; allowed is an integer of at least 1, or no value.",
        ),
    ],
)
def test_bad_values_are_named(file: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole sentence is compared below
        SamplingDefaults.of_model(file)
    assert str(error.value) == sentence
