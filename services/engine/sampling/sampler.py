"""The `Sampler` chooses the next token of each row from the row's logits; rows do not influence each other.

The order of the operations is the usual one (vLLM's):

1. The log probabilities that requests asked for are computed from the model's own logits.
2. Rows whose reasoning must end (`thinking_budget`) take the next token of the marker that ends it.
3. The logits of the other rows are edited: grammar; stop ids before `min_tokens`; `logit_bias`; `repetition_penalty`
   (prompt and output), `frequency_penalty` and `presence_penalty` (output only).
4. Greedy rows take the largest logit.
5. The other rows divide by the temperature, keep `top_k`, then `top_p` of the rest, then `min_p`, and draw a token. The
   noise of the draw depends on the request's seed and the position only.

`Sampler.sample` also chooses drafts, from the draft module's logits and with the same noise. The token at a position
depends only on the model's logits and on the noise at that position. A draft is accepted only if it equals this token.
So outputs have the same distribution as without drafts. Equal noise makes equal choices likely where the draft module's
distribution is close to the model's distribution.

Legend: S rows to sample, R the sampled rows that need more than an argmax, V vocabulary, E single logits to edit.
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
from services.engine.sampling import noise, truncation
from services.engine.sampling.sampler_state import SamplerState

# Temperatures and repetition penalties are clamped to these bounds, because fp32 would overflow beyond the bounds.
# Clamping does not change the outcome: at a bound, one token has all the probability, or all tokens have the same.
TEMPERATURES = (1e-30, 1e30)
REPETITIONS = (1e-6, 1e6)
MAX_LOGITS_CPU = 2**18  # logits edited at once on a CPU: the number that fits a core's cache
MAX_LOGITS_ELSEWHERE = 2**26  # logits edited at once on another device: the number that fits its spare memory


@dataclass(frozen=True)
class SampledToken:
    """A `SampledToken` is the token that the sampler chose for a row, with its logprob if the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None  # None unless the request asked for logprobs


@dataclass(frozen=True)
class SamplingRow:
    """A `SamplingRow` says which token to choose: the token after the request's tokens and the drafts in `ahead`."""

    request: Request
    ahead: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        return self.request.num_tokens + len(self.ahead)

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Return the ids that must not be chosen, because the request would end before it has `min_tokens` tokens."""
        is_early = self.request.num_generated + len(self.ahead) < self.request.params.min_tokens
        return self.request.stop_ids if is_early else frozenset()


class Sampler:
    """A `Sampler` samples tokens for one engine; `request.sampling_state` holds the sampler's state of a request."""

    def __init__(self) -> None:
        # Draw one token now, because the first call compiles the kernels and no request should wait for the compiler.
        noise.draw_tokens(target_weights(torch.zeros(1, 1), [SamplingParams(top_p=0.5)]), [(0, 0)])

    def sample(
        self, logits_SV: Tensor, rows: Sequence[SamplingRow], with_logprobs: bool = True
    ) -> list[SampledToken | None]:
        """Return the token of each row of fp32 logits, with logprobs if the request asked for them.

        A row's entry is None if no token can be chosen, because the row holds NaN or +infinity, or because the grammar
        does not allow the drafts in `ahead` or any next token.
        """
        assert logits_SV.shape[0] == len(rows)
        states = [_state_of(row.request, logits_SV) for row in rows]
        tokens = _largest(logits_SV)
        possible = [s for s in range(len(rows)) if tokens[s] is not None]
        forced = {s: token for s in possible if (token := _forced_id(rows[s], states[s])) is not None}
        special = [s for s in possible if s not in forced and not _is_plain(rows[s], states[s])]
        for some in _groups(special, logits_SV):
            chosen = _choose(logits_SV[some], [rows[s] for s in some], [states[s] for s in some])
            for s, token in zip(some, chosen, strict=True):
                tokens[s] = token
        for s, token_id in forced.items():
            tokens[s] = token_id
        logprobs = _logprobs(logits_SV, tokens, rows) if with_logprobs else {}
        return [None if token is None else SampledToken(token, logprobs.get(s)) for s, token in enumerate(tokens)]

    def explain(self, request: Request) -> ValueError | EngineFailed:
        """Return the error for a request that got no token: ValueError if the grammar failed, else EngineFailed."""
        state: SamplerState | None = request.sampling_state
        if state is not None and state.grammar is not None and state.grammar.failure:
            return ValueError(state.grammar.failure)
        return EngineFailed("The model's logits hold NaN or infinity, so no token can be chosen from them.")

    def release(self, request: Request) -> None:
        """Delete the sampler's state of a request that has ended."""
        request.sampling_state = None


def target_weights(logits_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return weights (S, V) in fp32, proportional to the probabilities with which tokens are drawn.

    The weights follow from the temperature, `top_k`, `top_p` and `min_p` in `params[s]` for row s.
    """
    temperature_S1 = logits_SV.new_tensor([[_clamp(p.temperature, TEMPERATURES)] for p in params])
    largest_S1 = logits_SV.amax(dim=-1, keepdim=True)
    weights_SV = torch.softmax((logits_SV - largest_S1).div_(temperature_S1), dim=-1)
    truncation.truncate(weights_SV, params)
    return weights_SV


def token_logprobs(logits_SV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Return the logprob and rank of one token per row, and the row's `num_top` likeliest tokens.

    `logits_SV` holds the model's own logits, before any edit. Of equally likely tokens, the lowest ids come first.
    """
    token_ids_S1 = torch.tensor(token_ids, device=logits_SV.device)[:, None]
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    own_S1 = logprobs_SV.gather(-1, token_ids_S1)
    ranks = _ranks(logprobs_SV, own_S1)
    tops = _likeliest(logprobs_SV, min(num_top, logits_SV.shape[-1]))
    own: list[float] = own_S1.squeeze(-1).tolist()
    return [TokenLogprob(*each) for each in zip(token_ids, own, ranks, tops, strict=True)]


def _logprobs(logits_SV: Tensor, tokens: Sequence[int | None], rows: Sequence[SamplingRow]) -> dict[int, TokenLogprob]:
    """Return the logprob of the token of each row whose request asked for logprobs, by row number."""
    num_tops = {s: row.request.params.logprobs for s, row in enumerate(rows) if tokens[s] is not None}
    asked = {s: num_top for s, num_top in num_tops.items() if num_top is not None}
    found: dict[int, TokenLogprob] = {}
    for some in _groups(list(asked), logits_SV):
        token_ids = [token for s in some if (token := tokens[s]) is not None]
        logprobs = token_logprobs(logits_SV[some], token_ids, max(asked[s] for s in some))
        for s, each in zip(some, logprobs, strict=True):
            found[s] = each if len(each.top) == asked[s] else replace(each, top=each.top[: asked[s]])
    return found


def _groups(rows: list[int], logits_SV: Tensor) -> Iterator[list[int]]:
    """Split row numbers into groups whose logits are few enough to be edited at once."""
    max_logits = MAX_LOGITS_CPU if logits_SV.is_cpu else MAX_LOGITS_ELSEWHERE
    size = max(1, max_logits // logits_SV.shape[-1])
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _state_of(request: Request, logits_SV: Tensor) -> SamplerState:
    if request.sampling_state is None:
        request.sampling_state = SamplerState(request, logits_SV.shape[-1], logits_SV.device)
    state: SamplerState = request.sampling_state
    return state


def _forced_id(row: SamplingRow, state: SamplerState) -> int | None:
    """Return the id that ends the row's reasoning, or None if the row's token is to be chosen from its logits.

    A stop id that must wait for `min_tokens` does not end the reasoning, because it would end the answer.
    """
    token_id = state.reasoning.forced_id(row.request, row.ahead) if state.reasoning else None
    return None if token_id in row.forbidden_ids else token_id


def _is_plain(row: SamplingRow, state: SamplerState) -> bool:
    """Return True if the row's token is the id of the largest logit, without noise and without edits."""
    return state.is_greedy and not state.is_edited and not row.forbidden_ids


def _largest(logits_SV: Tensor) -> list[int | None]:
    """Return the id of each row's largest logit, or None if the logit is not finite; of equal logits, the lowest id."""
    if logits_SV.is_cpu:  # numpy's argmax is over ten times faster than torch's; both treat NaN as the largest
        logits = logits_SV.numpy()
        ids = logits.argmax(axis=-1)
        values = logits[np.arange(len(ids)), ids]
        return [int(i) if ok else None for i, ok in zip(ids, np.isfinite(values), strict=True)]
    ids_S = logits_SV.argmax(dim=-1)
    are_finite = logits_SV.gather(-1, ids_S[:, None]).squeeze(-1).isfinite()
    return [i if ok else None for i, ok in zip(ids_S.tolist(), are_finite.tolist(), strict=True)]


def _choose(logits_RV: Tensor, rows: Sequence[SamplingRow], states: Sequence[SamplerState]) -> list[int | None]:
    """Return the token of each row, or None; `logits_RV` is edited in place, so the caller must pass a copy."""
    penalized = _apply_grammars(logits_RV, rows, states)
    _forbid(logits_RV, rows, states)
    _add_bias(logits_RV, states)
    if penalized:
        _penalize(logits_RV, rows, penalized)
    tokens = _largest(logits_RV)
    drawn = [r for r, state in enumerate(states) if tokens[r] is not None and not state.is_greedy]
    if drawn:
        weights_RV = target_weights(logits_RV[drawn], [rows[r].request.params for r in drawn])
        keys = [(rows[r].request.seed, rows[r].position) for r in drawn]
        for r, token in zip(drawn, noise.draw_tokens(weights_RV, keys), strict=True):
            tokens[r] = token
    return tokens


@dataclass(frozen=True)
class _Penalized:
    """A `_Penalized` lists the tokens with penalties in row number `row`, and how often each token was generated."""

    row: int
    ids: np.ndarray[tuple[int], np.dtype[np.int64]]
    counts: np.ndarray[tuple[int], np.dtype[np.float32]]


def _apply_grammars(logits_RV: Tensor, rows: Sequence[SamplingRow], states: Sequence[SamplerState]) -> list[_Penalized]:
    """Forbid the tokens that grammars do not allow, and return the counts of tokens for the penalties.

    The rows of one request share one state. So the loop moves the state to a row, and then reads the row's allowed
    tokens and counts before it moves the state to the next row.
    """
    penalized = []
    for r, (row, state) in enumerate(zip(rows, states, strict=True)):
        state.follow(row.request, row.ahead)
        if state.grammar is not None:
            request = row.request
            late_ids = row.forbidden_ids
            if request.params.ignore_eos:
                late_ids |= request.stop_ids - frozenset(request.params.stop_token_ids)
            allowed_V = state.grammar.allowed(logits_RV.shape[-1], request.stop_ids, late_ids)
            # 1 - 1 / 1 is 0 and 1 - 1 / 0 is -infinity. Adding these values is ten times faster than a masked fill.
            logits_RV[r] += 1 - torch.from_numpy(allowed_V).to(logits_RV.device).float().reciprocal_()
        if state.counts is not None:
            penalized.append(_Penalized(r, *state.counts.ids_and_counts()))
    return penalized


def _forbid(logits_RV: Tensor, rows: Sequence[SamplingRow], states: Sequence[SamplerState]) -> None:
    # Leave out rows with a grammar: the grammar's mask forbids these ids, except if only stop ids are allowed.
    early = [r for r, row in enumerate(rows) if states[r].grammar is None and row.forbidden_ids]
    if early:
        logits_RV[_places(early, [states[r].stop_ids for r in early])] = -torch.inf


def _add_bias(logits_RV: Tensor, states: Sequence[SamplerState]) -> None:
    if biased := [r for r, state in enumerate(states) if state.bias.ids]:
        places = _places(biased, [states[r].bias_ids for r in biased])
        logits_RV[places] += torch.cat([states[r].bias_values for r in biased])


def _places(rows: Sequence[int], ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the row index (E,) and the token id (E,) of each logit to edit: in `rows[i]`, the logits of `ids[i]`."""
    device = ids[0].device
    lens = torch.tensor([len(each) for each in ids], device=device)
    return torch.tensor(rows, device=device).repeat_interleave(lens), torch.cat(list(ids))


def _penalize(logits_RV: Tensor, rows: Sequence[SamplingRow], penalized: Sequence[_Penalized]) -> None:
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


def _ranks(logprobs_SV: Tensor, own_S1: Tensor) -> list[int]:
    """Return the rank of each row's own token: 1 plus the number of tokens that are likelier."""
    if logprobs_SV.is_cpu:  # numpy counts ten times as fast as torch
        rows = zip(logprobs_SV.numpy(), own_S1.numpy(), strict=True)
        return [1 + int(np.count_nonzero(logprobs_V > own)) for logprobs_V, own in rows]
    ranks: list[int] = (1 + (logprobs_SV > own_S1).sum(dim=-1)).tolist()
    return ranks


def _likeliest(logprobs_SV: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the `num_top` likeliest tokens of each row as (id, logprob), most likely first.

    Of equally likely tokens, the lowest id comes first.
    """
    num_found = min(num_top + 1, logprobs_SV.shape[-1])
    found = logprobs_SV.topk(num_found, dim=-1)
    pairs = zip(found.indices[:, :num_top].tolist(), found.values[:, :num_top].tolist(), strict=True)
    tops = [tuple(zip(*row, strict=True)) for row in pairs]
    # topk may return any of the equal values, in any order. One value more than needed shows if the last is tied.
    has_equals_S = (found.values[:, 1:] == found.values[:, :-1]).any(dim=-1)
    for s in has_equals_S.nonzero().flatten().tolist() if num_top else ():
        ids = (logprobs_SV[s] >= found.values[s, num_top - 1]).nonzero().flatten()
        equals = zip(ids.tolist(), logprobs_SV[s, ids].tolist(), strict=True)
        tops[s] = tuple(sorted(equals, key=lambda pair: (-pair[1], pair[0]))[:num_top])
    return tops
