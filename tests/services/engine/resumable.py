"""`KINDS` holds parameters for every kind of request; tests interrupt answers and continue them on another engine."""

from __future__ import annotations

import json

from services.engine.contract.sampling_params import Grammar, GrammarKind, LogitBias, SamplingParams, ThinkingBudget

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 12},
        "note": {"type": "string", "maxLength": 60},
    },
    "required": ["colour", "sizes", "note"],
    "additionalProperties": False,
}
LENGTH = 48
THINK_END = 6  # the demo model's id of `</think>`
KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True),
    "seeded": SamplingParams(seed=7, max_tokens=LENGTH, ignore_eos=True),
    "nucleus": SamplingParams(seed=-3, top_p=0.8, top_k=50, min_p=0.01, temperature=1.3, max_tokens=LENGTH),
    "penalties": SamplingParams(
        seed=1,
        presence_penalty=0.7,
        frequency_penalty=0.9,
        repetition_penalty=1.3,
        max_tokens=LENGTH,
        ignore_eos=True,
    ),
    "greedy penalties": SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=LENGTH, min_tokens=40),
    "logprobs": SamplingParams(seed=2, logprobs=3, prompt_logprobs=2, max_tokens=LENGTH, ignore_eos=True),
    "stop ids": SamplingParams(seed=9, min_tokens=20, stop_token_ids=tuple(range(5, 120)), max_tokens=LENGTH),
    "bias": SamplingParams(
        seed=4, logit_bias=LogitBias.of({100: 4.0, 200: -100.0}), max_tokens=LENGTH, ignore_eos=True
    ),
    "schema": SamplingParams(
        seed=5, grammar=Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)), max_tokens=3 * LENGTH
    ),
    "regex": SamplingParams(temperature=0, grammar=Grammar(GrammarKind.REGEX, "[a-z]{60,80}!"), max_tokens=2 * LENGTH),
    "thinking": SamplingParams(
        seed=6, thinking_budget=ThinkingBudget(20, ((300, 301), (302,), (303, 304))), max_tokens=LENGTH, ignore_eos=True
    ),
    "thinking with a schema": SamplingParams(
        temperature=0.7,
        seed=8,
        thinking_budget=ThinkingBudget(10, ((THINK_END,),)),
        grammar=Grammar(
            GrammarKind.LARK, f"start: think <[{THINK_END}]> answer\nthink: /(?s:.*)/\nanswer: /[a-z]{{9,30}}/\n"
        ),
        max_tokens=2 * LENGTH,
    ),
    "whole context": SamplingParams(seed=11),
}
