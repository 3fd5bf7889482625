"""The functions here convert requests and outputs to messages and back, for both ends of `Engine.Converse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from protos.expertmesh.engine.v1 import engine_pb2 as pb
from services.engine.contract.errors import DeadlinePassed, EngineFailed, EngineOverloaded
from services.engine.contract.sampling_params import Grammar, GrammarKind, LogitBias, SamplingParams, ThinkingBudget
from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput

RESHAPED = (
    "logit_bias",
    "grammar",
    "thinking_budget",
)  # fields of SamplingParams that have another type in the message
GATEWAY_ONLY = ("stop",)  # fields that stay in the gateway, which matches the stop strings
# All other fields of SamplingParams. Such a field has the same name and type in the message.
PLAIN = tuple(field.name for field in fields(SamplingParams) if field.name not in (*RESHAPED, *GATEWAY_ONLY))


def start_to_proto(
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    timeout: float | None,
    sent_token_ids: Sequence[int] | None = None,
) -> pb.Start:
    """Return the message that starts a request; the arguments have the same meaning as in `Engine.generate`.

    Raise ValueError if a token id is not a 64-bit integer. The engine checks later if the ids are in its vocabulary.
    """
    try:
        return pb.Start(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=params_to_proto(params),
            timeout_s=timeout,
            resume=None if sent_token_ids is None else pb.Resume(token_ids=sent_token_ids),
        )
    except ValueError:
        raise ValueError("prompt, stop_token_ids or logit_bias holds a token id beyond 64 bits.") from None


def params_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Return the message for sampling parameters; the message does not hold the stop strings."""
    given: dict[str, Any] = {name: value for name in PLAIN if (value := getattr(params, name)) is not None}
    if params.grammar is not None:
        given["grammar"] = pb.Grammar(
            kind=params.grammar.kind, text=params.grammar.text, num_counted=params.grammar.num_counted
        )
    if (budget := params.thinking_budget) is not None:
        end, start = (
            [pb.ThinkingBudget.MarkerToken(ids=ids) for ids in marker] for marker in (budget.end_ids, budget.start_ids)
        )
        given["thinking_budget"] = pb.ThinkingBudget(
            max_tokens=budget.max_tokens, end=end, start=start, blank_ids=budget.blank_ids
        )
    return pb.SamplingParams(bias_ids=params.logit_bias.ids, bias=params.logit_bias.values, **given)


def params_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """Return the sampling parameters that a message holds; raise ValueError if a value is not allowed."""
    values: dict[str, Any] = {name: _value(message, name) for name in PLAIN}
    if message.HasField("grammar"):
        values["grammar"] = Grammar(
            GrammarKind(message.grammar.kind), message.grammar.text, message.grammar.num_counted
        )
    if message.HasField("thinking_budget"):
        budget = message.thinking_budget
        end, start = (tuple(tuple(one.ids) for one in marker) for marker in (budget.end, budget.start))
        values["thinking_budget"] = ThinkingBudget(budget.max_tokens, end, start, tuple(budget.blank_ids))
    if message.bias_ids or message.bias:
        values["logit_bias"] = LogitBias(tuple(message.bias_ids), tuple(message.bias))
    return SamplingParams(**values)


def _value(message: pb.SamplingParams, name: str) -> Any:
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.has_presence and not message.HasField(name):
        return None
    value = getattr(message, name)
    return tuple(value) if field.is_repeated else value


def output_to_proto(output: TokenOutput) -> pb.Output:
    """Return the message for a `TokenOutput`."""
    return pb.Output(
        request_id=output.request_id,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason or "",
        num_prompt=output.num_prompt,
        num_generated=output.num_generated,
        logprobs=map(_logprob_to_proto, output.logprobs),
        prompt_logprobs=map(_logprob_to_proto, output.prompt_logprobs),
        num_cached=output.num_cached,
        cache_reason=output.cache_reason,
        queued_s=output.queued_s,
    )


def output_from_proto(message: pb.Output) -> TokenOutput:
    """Return the `TokenOutput` that a message holds."""
    return TokenOutput(
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        num_prompt=message.num_prompt,
        num_generated=message.num_generated,
        logprobs=tuple(map(_logprob_from_proto, message.logprobs)),
        prompt_logprobs=tuple(_logprob_from_proto(one) if one.rank else None for one in message.prompt_logprobs),
        num_cached=message.num_cached,
        cache_reason=message.cache_reason,
        queued_s=message.queued_s,
    )


def _logprob_to_proto(logprob: TokenLogprob | None) -> pb.TokenLogprob:
    if logprob is None:
        return pb.TokenLogprob()
    ids, values = zip(*logprob.top, strict=True) if logprob.top else ((), ())
    return pb.TokenLogprob(
        token_id=logprob.token_id, logprob=logprob.logprob, rank=logprob.rank, top_ids=ids, top_logprobs=values
    )


def _logprob_from_proto(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return TokenLogprob(message.token_id, message.logprob, message.rank, top)


def failure_to_proto(error: Exception) -> pb.Failure:
    """Return the message for the error that ended a request."""
    match error:
        case EngineOverloaded():
            return pb.Failure(kind=pb.Failure.OVERLOADED, message=str(error), retry_after_s=error.retry_after)
        case DeadlinePassed():
            return pb.Failure(kind=pb.Failure.DEADLINE, message=str(error))
        case EngineFailed():
            return pb.Failure(kind=pb.Failure.FAILED, message=str(error))
        case ValueError():
            return pb.Failure(kind=pb.Failure.INVALID, message=str(error))
    return pb.Failure(kind=pb.Failure.FAILED, message=f"The backbone failed with {type(error).__name__}: {error}")


def failure_from_proto(message: pb.Failure) -> Exception:
    """Return the exception that a message describes, or EngineFailed if the exception is not part of the contract."""
    if message.kind == pb.Failure.OVERLOADED:
        return EngineOverloaded(message.message, message.retry_after_s)
    kinds = {pb.Failure.INVALID: ValueError, pb.Failure.DEADLINE: DeadlinePassed}
    return kinds.get(message.kind, EngineFailed)(message.message)
