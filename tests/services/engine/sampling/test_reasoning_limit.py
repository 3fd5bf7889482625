from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from services.engine.contract.sampling_params import Grammar, GrammarKind, LogitBias, SamplingParams, ThinkingBudget
from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.engine.request import Request, RequestFactory
from services.engine.sampling.reasoning_limit import ReasoningLimit
from services.engine.sampling.sampler import Sampler, SamplingRow
from tests.services.demo import MODEL, load_tokenizer
from tests.services.engine.sampling.statistics import request

SAMPLER = Sampler()
SPECIAL = ((7,),)
TEXT = ((1, 11), (2,), (3, 13))  # a marker of three tokens, whose first and last token may have two ids


def forced(
    budget: ThinkingBudget, generated: Sequence[int], ahead: Sequence[int] = (), prompt: Any = (1,)
) -> int | None:
    return ReasoningLimit(budget).forced_id(request(prompt, generated), ahead)


@pytest.mark.parametrize(
    ("max_tokens", "end_ids", "tokens", "expected"),
    [
        (0, SPECIAL, [], 7),
        (2, SPECIAL, [9], None),
        (2, SPECIAL, [9, 9], 7),
        (2, SPECIAL, [9, 9, 9], 7),
        (2, SPECIAL, [9, 7], None),
        (2, SPECIAL, [7, 9, 9, 9], None),
        (2, SPECIAL, [9, 9, 7, 9, 9], None),
        (0, TEXT, [], 1),
        (2, TEXT, [9, 9], 1),
        (2, TEXT, [9, 9, 1], 2),
        (2, TEXT, [9, 9, 1, 2], 3),
        (2, TEXT, [9, 9, 1, 2, 3], None),
        (2, TEXT, [9, 11], 2),  # the marker has begun, in another spelling
        (2, TEXT, [11, 2], 3),
        (2, TEXT, [11, 2, 13], None),
        (2, TEXT, [1, 2, 9, 9], 1),  # what began was no marker
        (2, TEXT, [1, 1], 2),
        (2, TEXT, [2, 3], 1),  # only the end of a marker
    ],
)
def test_the_next_token_of_the_marker_is_forced_when_the_budget_is_used_up(
    max_tokens: int, end_ids: tuple[tuple[int, ...], ...], tokens: list[int], expected: int | None
) -> None:
    budget = ThinkingBudget(max_tokens, end_ids)
    for num_ahead in range(len(tokens) + 1):
        end = len(tokens) - num_ahead
        assert forced(budget, tokens[:end], tokens[end:]) == expected
        assert forced(budget, tokens[:end], tokens[end:], prompt=[1, 2, 3, 7, 1]) == expected, "the prompt counts"
    # One limit that follows the tokens one by one, with and without drafts, finds the same as a new limit.
    asked, limit = request([1, 2], []), ReasoningLimit(budget)
    for n, token_id in enumerate(tokens):
        limit.forced_id(asked, tokens[n:])
        limit.forced_id(asked, [7, 1, 2, 3])
        assert limit.forced_id(asked, ()) == forced(budget, tokens[:n])
        asked.token_ids.append(token_id)
    assert limit.forced_id(asked, ()) == expected


@pytest.mark.parametrize(
    ("max_tokens", "tokens", "expected"),
    [
        (0, [], None),
        (0, [20], 7),
        (0, [5, 6, 20], 7),
        (0, [5, 6], None),
        (2, [20, 9], None),
        (2, [20, 9, 9], 7),
        (2, [5, 20, 9, 9, 9], 7),
        (2, [20, 7, 9, 9, 9], None),
        (2, [7, 20, 9, 9], None),  # the answer begins with another text, so it has no reasoning
        (0, [9, 20], None),
        (0, [5, 9, 20, 9], None),
        (0, [20, 7, 20], None),
    ],
)
@pytest.mark.parametrize("start", [((20,),), ((20, 21), (22,))])
def test_a_budget_counts_from_the_marker_that_the_answer_writes(
    max_tokens: int, tokens: list[int], expected: int | None, start: tuple[tuple[int, ...], ...]
) -> None:
    if len(start) > 1:
        tokens = [token for one in tokens for token in ([21, 22] if one == 20 else [one])]
    budget = ThinkingBudget(max_tokens, SPECIAL, start, blank_ids=(5, 6))
    for num_ahead in range(len(tokens) + 1):
        end = len(tokens) - num_ahead
        assert forced(budget, tokens[:end], tokens[end:]) == expected
    asked, limit = request([20, 22], []), ReasoningLimit(budget)
    for n, token_id in enumerate(tokens):
        limit.forced_id(asked, tokens[n:])
        limit.forced_id(asked, [5, 20, 22, 9])
        assert limit.forced_id(asked, ()) == forced(budget, tokens[:n])
        asked.token_ids.append(token_id)
    assert limit.forced_id(asked, ()) == expected


def test_an_answer_that_another_engine_began_goes_on_as_it_would_have_there() -> None:
    resumed = Request("r", [5, 9, 9, 1], SamplingParams(), 0, max_len=99, num_sent=3)
    assert ReasoningLimit(ThinkingBudget(2, TEXT)).forced_id(resumed, ()) == 2
    assert ReasoningLimit(ThinkingBudget(4, TEXT)).forced_id(resumed, ()) is None


def tokens_of(asked: Request, logits: list[float], ahead: Sequence[int] = ()) -> int | None:
    [token] = SAMPLER.sample(torch.tensor([logits]), [SamplingRow(asked, tuple(ahead))])
    return token.token_id if token else None


def test_the_sampler_writes_the_marker_whatever_else_the_request_asks_for() -> None:
    logits = [9.0, 8.0, 0.0, 0.0, -torch.inf]
    budget = ThinkingBudget(1, ((4,), (3,)))
    others: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1, "top_p": 0.1, "top_k": 1},
        {"logit_bias": LogitBias.of({4: -100.0, 3: -100.0}), "presence_penalty": 2.0},
        {"min_tokens": 5, "stop_ids": {0}},
        {"ignore_eos": True, "stop_ids": {0}},
    ]
    for params in others:
        asked = request([2], [], thinking_budget=budget, **params)
        assert tokens_of(asked, logits) in (0, 1)
        assert tokens_of(asked, logits, [1]) == 4
        assert tokens_of(asked, logits, [1, 4]) == 3
        assert tokens_of(asked, logits, [1, 4, 3]) in (0, 1)
    assert tokens_of(request([2], [1], thinking_budget=budget), [torch.nan] * 5) is None


def test_a_marker_that_would_end_the_answer_waits_for_min_tokens() -> None:
    asked = request([2], [1], temperature=0, stop_ids={3}, min_tokens=2, thinking_budget=ThinkingBudget(0, ((3,),)))
    assert tokens_of(asked, [0.0, 1.0, 0.0, 0.0]) == 1
    asked.token_ids.append(1)
    assert tokens_of(asked, [0.0, 1.0, 0.0, 0.0]) == 3


def test_rows_with_a_budget_do_not_change_other_rows_and_have_logprobs() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    asked = [request([2], [1], seed=4, logprobs=2, thinking_budget=ThinkingBudget(n, SPECIAL)) for n in (0, 9, 1)]
    rows = [SamplingRow(one) for one in asked]
    sampled = SAMPLER.sample(logits, rows)
    assert [token and token.token_id for token in sampled][::2] == [7, 7]
    assert sampled == [SAMPLER.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(3)]
    assert sampled[0]
    assert sampled[0].logprob
    assert sampled[0].logprob.logprob == pytest.approx(torch.log_softmax(logits[0], dim=-1)[7].item())


def test_a_grammar_goes_on_after_the_marker() -> None:
    text = load_tokenizer().encode("reasoning, more of it", add_special_tokens=False)
    grammar = Grammar(GrammarKind.LARK, "start: think <[6]> answer\nthink: /(?s:.*)/\nanswer: /[0-9]{4}/\n")
    asked = request([2], [], temperature=0, grammar=grammar, thinking_budget=ThinkingBudget(len(text), ((6,),)))
    asked.compiled_grammar = GrammarCompiler(MODEL, [2]).compile(grammar)
    asked.stop_ids = frozenset({2})
    logits = torch.randn(1, 2048, generator=torch.Generator().manual_seed(1))
    asked.token_ids += text
    for _ in range(6):
        for ahead in ((), (6,), (6, text[0])):  # drafts, some of which the grammar refuses
            SAMPLER.sample(logits, [SamplingRow(asked, ahead)])
        [token] = SAMPLER.sample(logits, [SamplingRow(asked)])
        assert token
        asked.token_ids.append(token.token_id)
        if token.token_id == 2:
            break
    answer = asked.token_ids[1 + len(text) :]
    assert answer[0] == 6
    assert answer[-1] == 2
    assert load_tokenizer().decode(answer[1:-1]).isdecimal()


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    factory = RequestFactory(vocab_size=50, eos_token_ids=(), max_len=9, max_model_len=9)
    params = SamplingParams(thinking_budget=ThinkingBudget(1, ((3,), (4, 50))))
    with pytest.raises(ValueError, match="thinking_budget holds the token id 50; allowed are 0 to 49"):
        factory.make("r", [1], params, None, None, 0.0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((-1, SPECIAL), "thinking_budget must be at least 0, not -1"),
        ((1, ()), "thinking_budget must be given with the ids of a marker"),
        ((1, ((1,), ())), "thinking_budget must be given with the ids of a marker"),
        ((1, ((-3,),)), "thinking_budget must be given with ids of at least 0, not -3"),
        ((1, (tuple(range(9000)),)), "thinking_budget must be given with at most 8192 ids, not 9000"),
    ],
)
def test_bad_budgets_are_refused(values: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ThinkingBudget(*values)
