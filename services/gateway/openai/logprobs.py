"""`completion_logprobs`, `chat_logprobs` and `prompt_logprobs` are the three forms of logprobs in responses.

Source: OpenAI's API reference for completions and chat completions; `prompt_logprobs` is vLLM's form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from services.gateway.chat.text_delta import ScoredToken


def completion_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any] | None:
    if not scores:
        return None
    return {
        "tokens": [_name(score) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [None if score.logprob is None else _by_name([score, *score.top]) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _by_name(scores: Iterable[ScoredToken]) -> dict[str, float | None]:
    """Return a mapping from the text of each token in `scores` to the token's logprob."""
    return {_name(score): score.logprob for score in scores}


def _name(score: ScoredToken) -> str:
    """Return the text of a token, or its bytes in hexadecimal if the bytes are not complete characters.

    The format "bytes:\\x.." is the format of OpenAI's API. Without the hexadecimal digits, all tokens of incomplete
    characters would have the same name, U+FFFD.
    """
    if "\ufffd" in score.text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.data)
    return score.text


def chat_logprobs(scores: Sequence[ScoredToken]) -> dict[str, Any] | None:
    if not scores:
        return None
    content = [{**_chat_score(score), "top_logprobs": list(map(_chat_score, score.top))} for score in scores]
    return {"content": content, "refusal": None}


def _chat_score(score: ScoredToken) -> dict[str, Any]:
    return {"token": score.text, "logprob": score.logprob, "bytes": list(score.data)}


def prompt_logprobs(scores: Sequence[ScoredToken]) -> list[dict[str, Any] | None]:
    """Return the logprobs of the prompt's tokens in vLLM's format.

    The list holds None for the first token and one object for each later token. An object has one entry for the
    prompt's token and one for each alternative. The key of an entry is the token id; the value holds the logprob, rank
    and text of the token.
    """
    return [
        None if score.logprob is None else {str(one.token_id): _ranked(one, rank) for one, rank in _ranks(score)}
        for score in scores
    ]


def _ranks(score: ScoredToken) -> Iterable[tuple[ScoredToken, int]]:
    """Return the pair (token, rank) for the prompt's token `score` and for each of its alternatives.

    The most probable token has rank 1.
    """
    others = [(one, rank) for rank, one in enumerate(score.top, 1) if one.token_id != score.token_id]
    return [(score, score.rank), *others]


def _ranked(score: ScoredToken, rank: int) -> dict[str, Any]:
    return {"logprob": score.logprob, "rank": rank, "decoded_token": score.text}
