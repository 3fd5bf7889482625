"""An `OutputProcessor` turns the tokens of one choice into the text, tool calls and logprobs for the client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput
from services.gateway.chat.answer_parser import AnswerParser, AnswerParts
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.detokenizer import Detokenizer
from services.gateway.chat.stop_strings import StopMatcher
from services.gateway.chat.text_delta import ScoredToken, TextDelta
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.chat.tool_call_delta import ToolCallDelta

TOOL_CALLS = "tool_calls"  # OpenAI's finish reason for an answer that calls tools
FLOOR = -9999.0  # logprob that is shown for probability 0, because JSON has no infinity


class OutputProcessor:
    """An `OutputProcessor` turns the token outputs of one choice into text, reasoning, tool calls and logprobs.

    Stop strings and stop tokens end the choice only after `min_tokens` tokens. Every generated token has a logprob,
    even a stop token and the tokens of a stop string, whose text is shown only if the client asked for it.
    """

    def __init__(self, index: int, request: ChoiceRequest, tokenizer: Tokenizer) -> None:
        self._index, self._request, self._tokenizer = index, request, tokenizer
        self._num_tokens = self._num_reasoning = self._num_chars = 0
        self._stops = StopMatcher(request.stops)
        tool_use, tools = request.tool_use, request.tool_use.callable_tools
        dialect = tokenizer.dialect
        opens = request.opens_reasoning
        self._parser = AnswerParser(
            dialect, request.in_reasoning, tools, tool_use.is_forced, tool_use.max_calls, opens_reasoning=opens
        )
        thinks = [dialect.think_start] * opens + [dialect.think_end] * (opens or request.in_reasoning)
        used = [*thinks, *(dialect.call_markers if tools else ())]
        self._markers = {marker.token_id: marker for marker in used if marker.token_id is not None}
        markers = self._markers.values() if request.skip_special_tokens else tokenizer.special_markers
        self._detokenizer = Detokenizer(tokenizer.token_bytes, markers)
        self._is_first = True

    def push(self, output: TokenOutput) -> TextDelta:
        """Return the delta that one output of the engine adds to the choice.

        The last delta has a finish reason. A stop string or the last allowed tool call ends the choice even while the
        engine still runs the request.
        """
        if not self._is_first:
            return self._delta(output)
        self._is_first = False
        prompt_logprobs = tuple(self._scored_prompt(output)) if output.prompt_logprobs else ()
        echo = self._request.echo or ""
        self._num_chars += len(echo)
        if self._request.is_prompt_only:
            delta = TextDelta(self._index, "", (), FinishReason.LENGTH, output.num_prompt, 0)
            delta = replace(delta, num_cached=output.num_cached, cache_reason=output.cache_reason)
        else:
            delta = self._delta(output)
        token_ids = self._request.prompt_token_ids
        return replace(delta, text=echo + delta.text, prompt_logprobs=prompt_logprobs, prompt_token_ids=token_ids)

    def _delta(self, output: TokenOutput) -> TextDelta:
        # A stop token is the last token of an output.
        is_stop_hidden = output.finish_reason is FinishReason.STOP and not self._request.include_stop_str_in_output
        num_shown = len(output.token_ids) - is_stop_hidden
        first = self._num_tokens
        parts: list[AnswerParts] = []
        scored: list[ScoredToken] = []
        token_ids, reason, is_cut = output.token_ids, output.finish_reason, False
        for n, token_id in enumerate(output.token_ids[:num_shown]):
            if output.logprobs:
                scored.append(self._scored(output.logprobs[n], self._num_chars))
            part, is_cut = self._push_token(token_id)
            parts.append(part)
            if is_cut:
                token_ids, reason = output.token_ids[: n + 1], FinishReason.STOP
                break
        if output.logprobs and not is_cut:
            scored += [self._scored(score, self._num_chars) for score in output.logprobs[num_shown:]]
        if reason:
            parts += [] if is_cut else [self._parser.push(self._stops.flush())]
            parts.append(self._parser.finish())
        is_call = reason is FinishReason.STOP and self._parser.num_calls > 0
        return TextDelta(
            self._index,
            "".join(part.content for part in parts),
            token_ids,
            TOOL_CALLS if is_call else reason,
            output.num_prompt,
            first + len(token_ids) if is_cut else output.num_generated,
            "".join(part.reasoning for part in parts),
            _joined([call for part in parts for call in part.calls]),
            tuple(scored),
            (),
            output.num_cached,
            output.cache_reason,
            stop_string=self._stops.stop,
            num_reasoning=self._num_reasoning,
        )

    def _push_token(self, token_id: int) -> tuple[AnswerParts, bool]:
        self._num_tokens += 1
        self._num_reasoning += self._parser.is_in_reasoning
        text = self._detokenizer.push(token_id)
        self._num_chars += len(text)
        if marker := self._markers.get(token_id):
            self._parser.expect_marker(self._num_chars - len(marker.text))
        is_stopped = False
        if self._num_tokens > self._request.params.min_tokens:
            text, is_stopped = self._stops.push(text)
            text += self._stops.stop if is_stopped and self._request.include_stop_str_in_output else ""
        parts = self._parser.push(text)
        return parts, is_stopped or self._parser.is_done

    def _scored_prompt(self, output: TokenOutput) -> Iterator[ScoredToken]:
        spelling = self._tokenizer.spelling
        # An echoed prompt shows the names of special tokens, but not of special tokens that the tokenizer added itself.
        detokenizer = Detokenizer(self._tokenizer.token_bytes, self._tokenizer.special_markers)
        echo, whole = self._request.echo, self._tokenizer.decode(self._request.prompt_token_ids)
        position = 0 if echo is None else min(0, len(echo) - len(whole))
        for token_id, score in zip(self._request.prompt_token_ids, output.prompt_logprobs, strict=False):
            offset = max(0, position)
            yield (
                ScoredToken(token_id, spelling(token_id), offset=offset)
                if score is None
                else self._scored(score, offset)
            )
            position += len(detokenizer.push(token_id))

    def _scored(self, score: TokenLogprob, offset: int) -> ScoredToken:
        spelling = self._tokenizer.spelling
        top = tuple(ScoredToken(token_id, spelling(token_id), max(value, FLOOR)) for token_id, value in score.top)
        return ScoredToken(score.token_id, spelling(score.token_id), max(score.logprob, FLOOR), score.rank, top, offset)


def _joined(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """Return `deltas` with neighbouring pieces of the same tool call joined to one piece."""
    joined: list[ToolCallDelta] = []
    for delta in deltas:
        if joined and joined[-1].index == delta.index:
            last = joined[-1]
            joined[-1] = replace(last, arguments=last.arguments + delta.arguments)
        else:
            joined.append(delta)
    return tuple(joined)
