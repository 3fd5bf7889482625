"""The tests check which text an answer shows for its special tokens and its stop strings, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest

from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import FinishReason, TokenOutput
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.output_processor import OutputProcessor
from services.gateway.chat.stop_strings import StopStrings
from services.gateway.chat.text_delta import TextDelta, join
from services.gateway.chat.tokenizer import Tokenizer
from tests.services.gateway.echo import EOS

PROMPT = [1, 2, 3]


def answer(
    tokenizer: Tokenizer, text: str, reason: FinishReason, tokens_per_output: int, stop: str = "", **given: Any
) -> TextDelta:
    """Return the whole choice for an engine that generates the tokens of `text`."""
    tokens = tokenizer.encode(text)
    stops = [stop] if stop else []
    params = SamplingParams(stop=tuple(stops))
    choice = ChoiceRequest(PROMPT, params, stops=StopStrings(stops), **given)
    processor, deltas = OutputProcessor(0, choice, tokenizer), list[TextDelta]()
    for n in range(0, len(tokens), tokens_per_output):
        some = tuple(tokens[n : n + tokens_per_output])
        num_done = n + len(some)
        is_last = num_done == len(tokens)
        deltas.append(processor.push(TokenOutput("r", some, reason if is_last else None, len(PROMPT), num_done)))
        if deltas[-1].finish_reason:
            break
    return join(deltas)


@pytest.mark.parametrize("tokens_per_output", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "reason", "stop", "given", "shown"),
    [
        (f"hi<|im_start|>you{EOS}", FinishReason.STOP, "", {}, "hiyou"),
        (f"hi<|im_start|>you{EOS}", FinishReason.STOP, "", {"skip_special_tokens": False}, "hi<|im_start|>you"),
        (
            f"hi<|im_start|>you{EOS}",
            FinishReason.STOP,
            "",
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            f"hi<|im_start|>you{EOS}",
        ),
        (f"hi{EOS}", FinishReason.STOP, "", {"include_stop_str_in_output": True}, "hi"),
        ("hi you", FinishReason.STOP, "", {}, "hi yo"),
        ("hi you", FinishReason.STOP, "", {"include_stop_str_in_output": True}, "hi you"),
        ("hi you and", FinishReason.LENGTH, "you", {}, "hi "),
        ("hi you and", FinishReason.LENGTH, "you", {"include_stop_str_in_output": True}, "hi you"),
        ("hi yo", FinishReason.LENGTH, "you", {"include_stop_str_in_output": True}, "hi yo"),
        ("a<|im_start|>b", FinishReason.LENGTH, "im_start", {"skip_special_tokens": False}, "a<|"),
    ],
)
def test_texts(
    tokenizer: Tokenizer,
    text: str,
    reason: FinishReason,
    stop: str,
    given: dict[str, Any],
    shown: str,
    tokens_per_output: int,
) -> None:
    whole = answer(tokenizer, text, reason, tokens_per_output, stop, **given)
    assert whole.text == shown
    is_stopped = reason is FinishReason.STOP or (bool(stop) and stop in text)
    assert whole.finish_reason == (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
    assert whole.prompt_token_ids == PROMPT
    assert len(whole.token_ids) == whole.num_generated


@pytest.mark.parametrize("tokens_per_output", [1, 4, 100])
def test_tokens_of_reasoning_are_counted(tokenizer: Tokenizer, tokens_per_output: int) -> None:
    whole = answer(tokenizer, "so</think>yes", FinishReason.LENGTH, tokens_per_output, in_reasoning=True)
    assert (whole.reasoning, whole.text) == ("so", "yes")
    assert whole.num_reasoning == len(tokenizer.encode("so</think>"))
    never_ended = answer(tokenizer, "so and so", FinishReason.LENGTH, tokens_per_output, in_reasoning=True)
    assert never_ended.num_reasoning == never_ended.num_generated
    assert answer(tokenizer, "yes", FinishReason.LENGTH, tokens_per_output).num_reasoning == 0
