"""Chooses the next token of each row from its logits; every row is chosen without regard to the others.

The order is the field's (vLLM's). Of the model's own logits: logarithms of probabilities, for those who asked. Then
grammar; stop ids before `min_tokens`; `logit_bias`; `repetition_penalty` (prompt and output), `frequency_` and
`presence_penalty` (output). Greedy rows take the largest. The others divide by the temperature, keep `top_k`, then
`top_p` of what is left, then `min_p`, and draw with noise that only the request's seed and the position decide.

Drafts are chosen by the same function from the draft module's logits, with the same noise. The token at a position is
a function of the model's logits and the noise there, so a draft that equals it is accepted and nothing else is: outputs
are distributed as without drafts, and equal noise makes equal choices likely where the two distributions are close.

Legend: S rows to sample, R rows of them that need more than the largest logit, V vocabulary, E single logits to edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import TokenLogprob
from services.engine.request import Request
from services.engine.sampling import noise, nucleus
from services.engine.sampling.sampler_state import SamplerState

# Beyond these nothing changes but that fp32 overflows: one logit has all the probability, or all have the same.
TEMPERATURES = (1e-30, 1e30)
REPETITIONS = (1e-6, 1e6)
MAX_LOGITS_CPU = 2**18  # edited at once, as many as a core's cache holds
MAX_LOGITS_ELSEWHERE = 2**26  # or as a device has memory to spare for


@dataclass(frozen=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None = None  # None unless the request asked


@dataclass(frozen=True)
class Row:
    """One token to choose: the one that follows the request's tokens and then `ahead`, which are assumed only."""

    request: Request
    ahead: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        return self.request.num_tokens + len(self.ahead)

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Tokens that would end the request before `min_tokens`."""
        is_early = self.request.num_generated + len(self.ahead) < self.request.params.min_tokens
        return self.request.stop_ids if is_early else frozenset()


class Sampler:
    """One per engine; what it knows of a request lies in `request.sampling_state`."""

    def __init__(self) -> None:
        # Compiles what draws, which no request should wait for.
        noise.draw(target_weights(torch.zeros(1, 1), [SamplingParams(top_p=0.5)]), [(0, 0)])

    def sample(self, logits_SV: Tensor, rows: Sequence[Row], with_logprobs: bool = True) -> list[SampledToken | None]:
        """The token of each row of fp32 logits, with logarithms of probabilities where a request asked for them.

        None where no token can be chosen: the row holds NaN or +infinity, or its request's grammar refuses `ahead`.
        """
        assert logits_SV.shape[0] == len(rows)
        notes = [_notes(row.request) for row in rows]
        tokens = _largest(logits_SV)
        special = [s for s in range(len(rows)) if tokens[s] is not None and not _is_plain(rows[s], notes[s])]
        for some in _groups(special, logits_SV):
            chosen = _choose(logits_SV[some], [rows[s] for s in some], [notes[s] for s in some])
            for s, token in zip(some, chosen, strict=True):
                tokens[s] = token
        logprobs = _logprobs(logits_SV, tokens, rows) if with_logprobs else {}
        return [None if token is None else SampledToken(token, logprobs.get(s)) for s, token in enumerate(tokens)]

    def explain(self, request: Request) -> ValueError | EngineFailed:
        """Why no token could be chosen for a request that got None: its own grammar's fault, or ours."""
        notes: SamplerState | None = request.sampling_state
        if notes is not None and notes.grammar is not None and notes.grammar.failure:
            return ValueError(notes.grammar.failure)
        return EngineFailed("The model's logits hold NaN or infinity, so no token can be chosen from them.")

    def release(self, request: Request) -> None:
        """Forgets a request that has ended."""
        request.sampling_state = None


def target_weights(logits_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """(S, V) in fp32, proportional to the probabilities that tokens are drawn with."""
    temperature_S1 = logits_SV.new_tensor([[_clamp(p.temperature, TEMPERATURES)] for p in params])
    largest_S1 = logits_SV.amax(dim=-1, keepdim=True)
    weights_SV = torch.softmax((logits_SV - largest_S1).div_(temperature_S1), dim=-1)
    nucleus.cut(weights_SV, params)
    return weights_SV


def token_logprobs(logits_SV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """What the model's own logits say of one token per row, and of the `num_top` likeliest (ties: the lowest ids)."""
    token_ids_S1 = torch.tensor(token_ids, device=logits_SV.device)[:, None]
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    own_S1 = logprobs_SV.gather(-1, token_ids_S1)
    ranks: list[int] = (1 + (logprobs_SV > own_S1).sum(dim=-1)).tolist()
    tops = _likeliest(logprobs_SV, min(num_top, logits_SV.shape[-1]))
    own: list[float] = own_S1.squeeze(-1).tolist()
    return [TokenLogprob(*each) for each in zip(token_ids, own, ranks, tops, strict=True)]


def _logprobs(logits_SV: Tensor, tokens: Sequence[int | None], rows: Sequence[Row]) -> dict[int, TokenLogprob]:
    """By row, of those that asked."""
    num_tops = {s: row.request.params.logprobs for s, row in enumerate(rows) if tokens[s] is not None}
    asked = {s: num_top for s, num_top in num_tops.items() if num_top is not None}
    found: dict[int, TokenLogprob] = {}
    for some in _groups(list(asked), logits_SV):
        token_ids = [token for s in some if (token := tokens[s]) is not None]
        logprobs = token_logprobs(logits_SV[some], token_ids, max(asked[s] for s in some))
        found |= {s: replace(each, top=each.top[: asked[s]]) for s, each in zip(some, logprobs, strict=True)}
    return found


def _groups(rows: list[int], logits_SV: Tensor) -> Iterator[list[int]]:
    max_logits = MAX_LOGITS_CPU if logits_SV.is_cpu else MAX_LOGITS_ELSEWHERE
    size = max(1, max_logits // logits_SV.shape[-1])
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _notes(request: Request) -> SamplerState:
    if request.sampling_state is None:
        request.sampling_state = SamplerState(request)
    notes: SamplerState = request.sampling_state
    return notes


def _is_plain(row: Row, notes: SamplerState) -> bool:
    return notes.is_greedy and not notes.is_edited and not row.forbidden_ids


def _largest(logits_SV: Tensor) -> list[int | None]:
    """The id of each row's largest logit, the lowest of several; None where that is not finite."""
    if logits_SV.is_cpu:  # numpy's is over ten times faster than torch's; both call NaN the largest
        logits = logits_SV.numpy()
        ids = logits.argmax(axis=-1)
        values = logits[np.arange(len(ids)), ids]
        return [int(i) if ok else None for i, ok in zip(ids, np.isfinite(values), strict=True)]
    ids_S = logits_SV.argmax(dim=-1)
    are_finite = logits_SV.gather(-1, ids_S[:, None]).squeeze(-1).isfinite()
    return [i if ok else None for i, ok in zip(ids_S.tolist(), are_finite.tolist(), strict=True)]


def _choose(logits_RV: Tensor, rows: Sequence[Row], notes: Sequence[SamplerState]) -> list[int | None]:
    """Edits the logits, which are a copy, in place."""
    penalized = _follow(logits_RV, rows, notes)
    _forbid(logits_RV, rows, notes)
    _add_bias(logits_RV, notes)
    if penalized:
        _penalize(logits_RV, rows, penalized)
    tokens = _largest(logits_RV)
    drawn = [r for r, note in enumerate(notes) if tokens[r] is not None and not note.is_greedy]
    if drawn:
        weights_RV = target_weights(logits_RV[drawn], [rows[r].request.params for r in drawn])
        keys = [(rows[r].request.seed, rows[r].position) for r in drawn]
        for r, token in zip(drawn, noise.draw(weights_RV, keys), strict=True):
            tokens[r] = token
    return tokens


@dataclass(frozen=True)
class _Penalized:
    """The tokens that row `row` has penalties for, and how often each was generated, both (E,)."""

    row: int
    ids: np.ndarray[tuple[int], np.dtype[np.int64]]
    counts: np.ndarray[tuple[int], np.dtype[np.float32]]


def _follow(logits_RV: Tensor, rows: Sequence[Row], notes: Sequence[SamplerState]) -> list[_Penalized]:
    """Brings notes up to date row by row, for rows of one request share them; applies grammars on the way."""
    penalized = []
    for r, (row, note) in enumerate(zip(rows, notes, strict=True)):
        note.follow(row.request, row.ahead)
        if note.grammar is not None:
            request = row.request
            late_ids = row.forbidden_ids
            if request.params.ignore_eos:
                late_ids |= request.stop_ids - frozenset(request.params.stop_token_ids)
            allowed_V = note.grammar.allowed(logits_RV.shape[-1], request.stop_ids, late_ids)
            # 1 - 1 / 1 is 0 and 1 - 1 / 0 is -infinity: ten times faster than to fill where a mask says so.
            logits_RV[r] += 1 - torch.from_numpy(allowed_V).to(logits_RV.device).float().reciprocal_()
        if note.history is not None:
            penalized.append(_Penalized(r, *note.history.ids_and_counts()))
    return penalized


def _forbid(logits_RV: Tensor, rows: Sequence[Row], notes: Sequence[SamplerState]) -> None:
    # A grammar's mask has seen to it already, and knows where nothing but a stop id is left.
    forbidden = [row.forbidden_ids if note.grammar is None else () for row, note in zip(rows, notes, strict=True)]
    if pairs := [(r, token_id) for r, token_ids in enumerate(forbidden) for token_id in token_ids]:
        rows_E, ids_E = torch.tensor(pairs, device=logits_RV.device).unbind(dim=1)
        logits_RV[rows_E, ids_E] = -torch.inf


def _add_bias(logits_RV: Tensor, notes: Sequence[SamplerState]) -> None:
    if biases := [(r, token_id, bias) for r, note in enumerate(notes) for token_id, bias in note.bias.items()]:
        rows, ids, values = zip(*biases, strict=True)
        rows_E, ids_E = torch.tensor([rows, ids], device=logits_RV.device)
        logits_RV[rows_E, ids_E] += logits_RV.new_tensor(values)


def _penalize(logits_RV: Tensor, rows: Sequence[Row], penalized: Sequence[_Penalized]) -> None:
    device = logits_RV.device
    params = [rows[each.row].request.params for each in penalized]
    lens = torch.tensor([len(each.ids) for each in penalized], device=device)

    def spread(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(lens)

    rows_E = spread([each.row for each in penalized])
    ids_E = torch.from_numpy(np.concatenate([each.ids for each in penalized])).to(device)
    counts_E = torch.from_numpy(np.concatenate([each.counts for each in penalized])).to(device)
    repetition_E = spread([_clamp(p.repetition_penalty, REPETITIONS) for p in params])
    values_E = logits_RV[rows_E, ids_E]
    values_E = torch.where(values_E > 0, values_E / repetition_E, values_E * repetition_E)
    values_E -= counts_E * spread([p.frequency_penalty for p in params])
    values_E -= (counts_E > 0) * spread([p.presence_penalty for p in params])
    logits_RV[rows_E, ids_E] = values_E


def _clamp(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _likeliest(logprobs_SV: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    found = logprobs_SV.topk(num_top, dim=-1)
    tops = [list(zip(*row, strict=True)) for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)]
    if num_top:  # which of equal ones topk finds is its own affair
        num_over_S = (logprobs_SV >= found.values[:, -1:]).sum(dim=-1) - num_top
        for s in num_over_S.nonzero().flatten().tolist():
            ids = (logprobs_SV[s] >= found.values[s, -1]).nonzero().flatten()
            tops[s] = list(zip(ids.tolist(), logprobs_SV[s, ids].tolist(), strict=True))
    return [tuple(sorted(top, key=lambda pair: (-pair[1], pair[0]))[:num_top]) for top in tops]
