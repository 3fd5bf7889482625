"""The module gives tests the demo model, prompts, and the tokens that `transformers` generates after a prompt."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, NemotronHForCausalLM

from model.demo import DEMO, corpus
from tests.model.checkpoints import write_tiny

MODEL = Path(os.environ.get("EXPERTMESH_TEST_MODEL", DEMO))


@cache
def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True, model_max_length=10**6)


@cache
def held_out_prompts(count: int, length: int = 64) -> list[list[int]]:
    """Return at most `count` prompts of `length` tokens each. Each prompt is the beginning of a held-out file."""
    beginnings = (load_tokenizer().encode(text)[:length] for text in corpus.read_corpus()[1])
    return [ids for ids in beginnings if len(ids) == length][:count]


def transformers_greedy(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Return, for each prompt, the tokens that `transformers` generates greedily in fp32, with the end token.

    All prompts must have the same length.
    """
    model: Any = NemotronHForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ends = set(model.generation_config.eos_token_id)
    with torch.inference_mode():
        rows = model.generate(torch.tensor(prompts), max_new_tokens=max_tokens, do_sample=False)
    return [_up_to_end(row[len(prompts[0]) :].tolist(), ends) for row in rows]


def _up_to_end(token_ids: list[int], ends: set[int]) -> list[int]:
    num_tokens = next((n for n, token in enumerate(token_ids, 1) if token in ends), len(token_ids))
    return token_ids[:num_tokens]


def text_of(token_ids: Sequence[int]) -> str:
    """Return the text of tokens, but without an incomplete character at the end: the server does not send it either."""
    return str(load_tokenizer().decode(token_ids, skip_special_tokens=True)).rstrip("\ufffd")


def write_served(path: Path, variant: str, **changes: Any) -> Path:
    """Write a tiny model of a variant in `tests.model.checkpoints` with the demo's tokenizer; return `path`."""
    write_tiny(path, variant, vocab_size=len(load_tokenizer()), **changes)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, path)
    return path
