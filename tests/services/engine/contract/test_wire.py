from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from protos.expertmesh.engine.v1 import engine_pb2 as pb
from services.engine.contract import wire
from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar, GrammarKind, LogitBias, SamplingParams, ThinkingBudget
from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput

EVERYTHING: dict[str, Any] = {
    "max_tokens": 9,
    "temperature": 0.3,
    "top_p": 0.7,
    "top_k": -1,
    "seed": -(2**63),
    "stop": ("a", "b"),
    "stop_token_ids": (3, 4),
    "ignore_eos": True,
    "min_tokens": 2,
    "min_p": 0.1,
    "presence_penalty": -1.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": LogitBias((5, 6), (-100.0, 0.1)),
    "logprobs": 0,
    "prompt_logprobs": 3,
    "grammar": Grammar(GrammarKind.REGEX, "a+", 7),
    "priority": -3,
    "cache_salt": "of one user",
    "thinking_budget": ThinkingBudget(0, ((13, 14), (15,)), ((16,), (17, 18)), (19, 20)),
}
LOGPROB = TokenLogprob(7, -0.1, 2, ((8, -0.05), (7, -0.1)))


def over_the_wire(params: SamplingParams) -> SamplingParams:
    return wire.params_from_proto(pb.SamplingParams.FromString(wire.params_to_proto(params).SerializeToString()))


def test_every_parameter_arrives_but_the_gateways_own_stop_strings() -> None:
    assert EVERYTHING.keys() == {field.name for field in fields(SamplingParams)}
    assert over_the_wire(SamplingParams(**EVERYTHING)) == SamplingParams(**EVERYTHING | {"stop": ()})
    assert over_the_wire(SamplingParams()) == SamplingParams()


def test_a_value_out_of_its_bounds_is_refused_on_arrival() -> None:
    message = wire.params_to_proto(SamplingParams())
    message.top_p = 1.5
    with pytest.raises(ValueError, match=r"top_p must be 0 to 1, not 1\.5"):
        wire.params_from_proto(message)


def test_ids_that_no_model_has_travel_or_are_refused_in_a_sentence() -> None:
    assert list(wire.start_to_proto("r", [-1, 2**40], SamplingParams(), None).prompt_token_ids) == [-1, 2**40]
    with pytest.raises(ValueError, match="token id beyond 64 bits"):
        wire.start_to_proto("r", [2**70], SamplingParams(), None)


@pytest.mark.parametrize(
    "output",
    [
        TokenOutput("r", (1, 2), None, 3, 2),
        TokenOutput("r", (1,), FinishReason.STOP, 3, 2, (LOGPROB,), (None, LOGPROB), 16, "evicted", 0.25),
    ],
)
def test_an_output_arrives_as_it_was(output: TokenOutput) -> None:
    message = pb.Output.FromString(wire.output_to_proto(output).SerializeToString())
    assert wire.output_from_proto(message) == output


@pytest.mark.parametrize(
    "error", [ValueError("prompt is odd"), DeadlinePassed("late"), EngineFailed("broken"), EngineOverloaded("full", 7)]
)
def test_a_failure_keeps_its_type_and_its_sentence(error: Exception) -> None:
    arrived = wire.failure_from_proto(wire.failure_to_proto(error))
    assert (type(arrived), str(arrived)) == (type(error), str(error))
    assert getattr(arrived, "retry_after", None) == getattr(error, "retry_after", None)


def test_any_other_failure_is_the_engines() -> None:
    arrived = wire.failure_from_proto(wire.failure_to_proto(KeyError("x")))
    assert isinstance(arrived, EngineFailed)
    assert str(arrived) == "The backbone failed with KeyError: 'x'"
