"""`choice_messages` and `usage_message` write the messages of inference.proto."""

from __future__ import annotations

from collections.abc import Sequence

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.engine.contract.token_output import FinishReason
from services.gateway.chat.output_processor import TOOL_CALLS
from services.gateway.chat.text_delta import ScoredToken, TextDelta
from services.gateway.chat.token_usage import TokenUsage
from services.gateway.chat.tool_call_delta import ToolCallDelta

FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


def choice_messages(deltas: Sequence[TextDelta], has_prompt: bool) -> list[pb.Choice]:
    """Return the protobuf messages for pieces of choices, with the prompts' tokens if `has_prompt` is True."""
    return [_choice(delta, has_prompt) for delta in deltas]


def _choice(delta: TextDelta, has_prompt: bool) -> pb.Choice:
    return pb.Choice(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=FINISH_REASONS[delta.finish_reason],
        reasoning_content=delta.reasoning,
        tool_calls=[_call(call) for call in delta.calls],
        logprobs=_scores(delta.logprobs),
        prompt_logprobs=_scores(delta.prompt_logprobs),
        prompt_token_ids=delta.prompt_token_ids if has_prompt else (),
    )


def _call(call: ToolCallDelta) -> pb.ToolCall:
    return pb.ToolCall(index=call.index, id=call.id, name=call.name, arguments=call.arguments)


def _scores(scores: Sequence[ScoredToken]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=score.token_id,
            data=score.data,
            logprob=score.logprob,
            rank=score.rank,
            top=_scores(score.top),
            text_offset=score.offset,
        )
        for score in scores
    ]


def usage_message(usage: TokenUsage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )
