"""The tests check the demo checkpoint's size and recorded figures, and compare greedy tokens with transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import NemotronHForCausalLM

from model.demo import DEMO
from model.demo.corpus import encode_all, read_corpus
from model.families.nemotron_h import NemotronH
from model.families.registry import load_family
from model.family import ModelFamily
from model.state import Batch, State

NUM_PROMPTS, PROMPT_LEN, NUM_NEW = 5, 64, 48
WINDOW, NUM_WINDOWS = 768, 8


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return load_family(DEMO)


@pytest.fixture(scope="module")
def model(family: ModelFamily) -> NemotronH:
    return family.load_backbone(family.load_local_experts(torch.float32), torch.float32)


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    """Return the token ids of windows that lie far apart in the held-out text: (NUM_WINDOWS, WINDOW)."""
    texts = read_corpus()[1]
    tokens = torch.from_numpy(encode_all(Tokenizer.from_file(str(DEMO / "tokenizer.json")), texts))
    starts = torch.linspace(0, len(tokens) - WINDOW, NUM_WINDOWS).long()
    return torch.stack([tokens[start : start + WINDOW] for start in starts])


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((DEMO / "metrics.json").read_text())["held_out"]
    return recorded


def one_request(token_ids: torch.Tensor) -> Batch:
    pages = tuple(range(-(-len(token_ids) // 16)))
    return Batch(token_ids, (len(token_ids),), (0,), (0,), (pages,))


def test_the_shape_is_the_family_s(family: ModelFamily) -> None:
    config = family.config
    assert [config.pattern.count(letter) for letter in "M*E"] == [6, 2, 6]
    assert config.n_routed_experts >= 32
    assert config.num_experts_per_tok >= 4
    assert config.moe_latent_size == config.hidden_size // 4
    assert family.has_mtp
    assert (DEMO / "model.safetensors").stat().st_size <= 24_000_000


def test_it_beats_xz_and_its_drafts_are_accepted(metrics: dict[str, Any]) -> None:
    assert metrics["bits_per_byte"] < metrics["xz_9_bits_per_byte"]
    assert metrics["first_draft_accepted"] >= 0.6
    assert all(layer["least_used_share_of_mean"] > 0 for layer in metrics["layers"].values())


def test_the_figures_are_this_checkpoint_s(model: NemotronH, held_out: torch.Tensor, metrics: dict[str, Any]) -> None:
    """Check that loss and draft acceptance on a sample of the held-out text are near the recorded figures."""
    state = State(model.config.state_spec, 1, WINDOW // 16, torch.float32)
    losses, hits = [], []
    for token_ids in held_out:
        with torch.inference_mode():
            hidden = model(one_request(token_ids), state)
            logits = model.logits(hidden)
            losses.append(torch.nn.functional.cross_entropy(logits[:-1], token_ids[1:]))
            drafts = model.logits(model.draft(one_request(token_ids[1:]), hidden[:-1], state)).argmax(-1)
            hits.append((drafts[:-1] == logits.argmax(-1)[1:-1]).float().mean())
    assert torch.stack(losses).mean() == pytest.approx(metrics["nats_per_token"], rel=0.25)
    assert torch.stack(hits).mean() == pytest.approx(metrics["first_draft_accepted"], rel=0.15)


def test_greedy_tokens_equal_transformers(model: NemotronH, held_out: torch.Tensor) -> None:
    oracle = NemotronHForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    state = State(model.config.state_spec, 1, (PROMPT_LEN + NUM_NEW) // 16 + 1, torch.float32)
    for prompt in held_out[:NUM_PROMPTS, :PROMPT_LEN]:
        with torch.inference_mode():
            expected = oracle.generate(
                prompt[None], max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False, eos_token_id=-1
            )[0, PROMPT_LEN:].tolist()
            assert greedy(model, prompt, state) == expected


def greedy(model: NemotronH, prompt: torch.Tensor, state: State) -> list[int]:
    """Decode NUM_NEW tokens greedily after `prompt`, one token per step, and return the token ids."""
    pages = tuple(range(state.num_blocks))
    made: list[int] = []
    new, context_len = prompt, 0
    while len(made) < NUM_NEW:
        hidden = model(Batch(new, (len(new),), (context_len,), (0,), (pages,)), state)
        made.append(int(model.logits(hidden[-1]).argmax()))
        context_len, new = context_len + len(new), torch.tensor(made[-1:])
    return made
