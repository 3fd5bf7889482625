"""The script trains the demo model, a small model of Nemotron 3's shape, on the Python standard library.

    python -m model.demo.train --steps 2000 --out model/demo/checkpoint

Training takes an hour or two on two CPU cores. The training state is saved every 100 steps, and `--resume` continues
from the saved state after a stop. Training uses the same layers as serving (`model/`). `model.demo` adds only what
training needs: whole sequences instead of packed steps, differentiable experts, and the balancing of the router.

Legend: B sequences, T tokens of each, D hidden, V vocabulary, N = B·T rows, K picks per row.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from model.blocks.moe import MoE
from model.configs.nemotron_h import NemotronHConfig
from model.demo import DEMO
from model.demo.corpus import IM_END, VOCAB_SIZE, encode_all, read_corpus, train_tokenizer
from model.demo.export import CONFIG, export, restore
from model.demo.sequence import TrainableExperts, sequence_draft, sequence_hidden
from model.families.nemotron_h import NemotronH

MTP_WEIGHTS = (0.5, 0.25)  # weights of the first and the second draft in the loss
# Step of the correction bias in auxiliary-loss-free balancing (DeepSeek-V3 section 2.1.2). The paper uses 1e-3; in such
# a short run, 1e-3 would leave most experts unused.
BIAS_RATE = 1e-2


def draft_loss(head_VD: Tensor, hidden_BTD: Tensor, target_BTV: Tensor) -> Tensor:
    """Return the cross-entropy between drafts and the model's own distribution.

    `hidden_BTD` are the drafts' hidden vectors, `head_VD` is the model's head, and `target_BTV` are the model's logits.
    """
    logits_BTV = F.linear(hidden_BTD, head_VD).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), target_BTV.flatten(0, 1).softmax(-1))


compiled_draft_loss = torch.compile(draft_loss)


def loss_of(model: NemotronH, ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return training loss, next-token loss in nats, and the share of first drafts that equal the greedy token.

    The MTP module is trained on the model's own distribution rather than on the text, because a draft is accepted if
    the draft equals the model's own token.
    """
    hidden_BTD = sequence_hidden(model, ids_BT)
    logits_BTV = model.logits(hidden_BTD)
    main = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    own_BTV = logits_BTV.detach()
    total, accepted = main, main
    for depth, weight in enumerate(MTP_WEIGHTS, start=1):
        # Position t has read x_{t+depth} and drafts x_{t+depth+1}. The model predicts this token at position t+depth.
        next_ids = F.pad(ids_BT[:, depth:], (0, depth))
        hidden_BTD = sequence_draft(model, next_ids, hidden_BTD)
        target_BTV = own_BTV[:, depth:]
        assert model.lm_head is not None
        assert model.lm_head.weight is not None
        total = total + weight * compiled_draft_loss(model.lm_head.weight, hidden_BTD[:, :-depth], target_BTV)
        if depth == 1:
            with torch.no_grad():
                draft_BTV = model.logits(hidden_BTD[:, :-depth])
            accepted = (draft_BTV.argmax(-1) == target_BTV.argmax(-1)).float().mean()
    return total, main.detach(), accepted


def initialise(model: NemotronH) -> None:
    """Initialise matrices with scaled normal numbers, and A, Δ and D as in Mamba-2."""
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith("A_log"):
                p.copy_(torch.empty_like(p).uniform_(1, 16).log())
            elif name.endswith("dt_bias"):
                delta = torch.exp(torch.empty_like(p).uniform_(math.log(1e-3), math.log(0.1)))
                p.copy_(delta + torch.log(-torch.expm1(-delta)))
            elif name.endswith("mixer.D"):
                p.fill_(1.0)
            elif "embeddings" in name or "gate.weight" in name:
                p.normal_(std=0.02)
            elif p.dim() == 2:
                is_output = any(part in name for part in ("out_proj", "o_proj", "down_proj", "fc2"))
                p.normal_(std=p.shape[1] ** -0.5 * (0.3 if is_output else 1.0))
            elif name.endswith("conv1d.weight"):
                p.uniform_(-0.5, 0.5)
            elif name.endswith("bias"):
                p.zero_()
    for name, buffer in model.named_buffers():
        assert name.endswith("e_score_correction_bias")
        buffer.zero_()


def make_optimizers(model: NemotronH, experts: TrainableExperts) -> list[torch.optim.Optimizer]:
    """Return Muon for the backbone's matrices and AdamW for all other parameters, among them embeddings and experts."""
    named = [*model.named_parameters()]
    matrices = [
        p for name, p in named if p.dim() == 2 and not any(s in name for s in ("embeddings", "lm_head", "gate.weight"))
    ]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(
            [{"params": others, "lr": 4e-3}, {"params": experts.parameters(), "lr": 4e-3}],
            betas=(0.9, 0.95),
            weight_decay=0.01,
        ),
    ]


def balance(model: NemotronH, experts: TrainableExperts, rate: float) -> None:
    """Raise the correction bias of experts with too few picks, and lower the bias of experts with too many.

    The bias of an expert changes by `rate` if the expert's number of picks differs from the mean.
    """
    gates = {m.shape.layer: m.gate for m in model.modules() if isinstance(m, MoE)}
    for layer, counts_E in experts.counts.items():
        bias: Any = gates[layer].e_score_correction_bias
        bias += rate * (counts_E.float().mean() - counts_E).sign()
    experts.counts.clear()


def sample_windows(
    tokens: np.ndarray, generator: np.random.Generator, num_seqs: int, length: int, chat: np.ndarray
) -> Tensor:
    """Draw random windows of the text: int64 (num_seqs, length).

    One window in eight becomes a chat turn in ChatML: the user gives the window's beginning, and the assistant
    continues the text. `chat` is the result of `chat_frame`.
    """
    starts = generator.integers(0, len(tokens) - length, num_seqs)
    windows = np.stack([tokens[s : s + length] for s in starts])
    opening, middle = chat[: int(chat[-1])], chat[int(chat[-1]) : -1]
    for window in windows[generator.random(num_seqs) < 1 / 8]:
        cut = int(generator.integers(8, 200))
        turn = np.concatenate([opening, window[:cut], middle, window[cut:]])[:length]
        if generator.random() < 0.5:  # half of the turns end with <|im_end|>, as if the text stopped there
            turn[-1] = IM_END
        window[:] = turn
    return torch.from_numpy(windows)


def chat_frame(tokenizer: Any) -> np.ndarray:
    """Return the token ids that frame a chat turn's two parts, as one array.

    The array holds the ids before the user's part, then the ids between the two parts. The last number of the array is
    the number of ids before the user's part.
    """
    opening = tokenizer.encode("<|im_start|>user\n").ids
    middle = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think></think>").ids
    return np.array([*opening, *middle, len(opening)])


def learning_rate(step: int, num_steps: int) -> float:
    """Return the learning rate's factor in a step: warm-up, a plateau, then a fall to 0 over the last 60 % of steps."""
    return min(1.0, (step + 1) / 40, (num_steps - step) / (0.6 * num_steps))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model on the Python standard library.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/expertmesh-demo"), help="directory of the saved training state"
    )
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    training, held_out = read_corpus()
    tokenizer = train_tokenizer(training)
    tokens = encode_all(tokenizer, training)
    chat = chat_frame(tokenizer)
    config = NemotronHConfig.from_json(CONFIG)
    assert config.vocab_size == VOCAB_SIZE == tokenizer.get_vocab_size()
    experts = TrainableExperts(config, args.device)
    model = NemotronH(config, experts)
    initialise(model)
    model.to(args.device)
    optimizers = make_optimizers(model, experts)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    generator = np.random.default_rng(0)
    first, log, saved = 0, [], args.work / "state.pt"
    if args.resume:
        state = restore(saved, model, experts)
        for optimizer, value in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        first, log, generator = state["step"], state["log"], state["generator"]

    for step in track(range(first, args.steps), description="training", total=args.steps, completed=first):
        rate = learning_rate(step, args.steps)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate
        ids_BT = sample_windows(tokens, generator, args.sequences, args.length, chat).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss, nats, accepted = loss_of(model, ids_BT)
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *experts.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        balance(model, experts, BIAS_RATE * rate)
        log.append((step, float(nats), float(accepted)))
        if step % 10 == 9:
            recent = np.array(log[-10:]).mean(0)
            print(f"step {step + 1}  nats {recent[1]:.3f}  first draft accepted {recent[2]:.3f}", flush=True)
        if step % 100 == 99 or step + 1 == args.steps:
            weights = {"model": model.state_dict(), "experts": [p.detach() for p in experts.parameters()]}
            states = {
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
                "log": log,
                "generator": generator,
            }
            torch.save({**weights, **states}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
    export(model, experts, tokenizer, held_out, log, args.out)


if __name__ == "__main__":
    main()
