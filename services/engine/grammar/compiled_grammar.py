"""Grammars: what text an answer must match, as a mask over the tokens that may come next.

`GrammarCompiler.check` refuses a client's mistake where the request comes in; `GrammarCompiler.compile` belongs on a
thread of its own (a large schema takes up to a second), before the request reaches the engine:

    request.compiled_grammar = await asyncio.to_thread(compiler.compile, params.grammar)

What ends an answer: a stop id of the request that is no text (an end-of-sequence token) is allowed exactly where the
grammar may end, and nothing else once it can only end. A stop id that is ordinary text stays one wherever its text is
allowed. So a request with a grammar needs the model's end-of-sequence ids among its `stop_ids` even where `ignore_eos`
is asked for, which then means: not before the grammar can only end.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from services.engine.contract.sampling_params import JSON_OPTIONS, Grammar, GrammarKind

_stack_size_lock = threading.Lock()  # the size is the process's, for threads to come

MAX_GRAMMARS = 16  # compiled ones kept; each may hold MAX_LEXER_STATES of 1 to 2 kB, all together 640 MB
MAX_LEXER_STATES = 20_000
MAX_TEXT = 2**17  # characters of a grammar
COMPILE_STACK = 2**29  # bytes; the library recurses, and a chain of rules as long as MAX_TEXT allows takes 2**26
NO_TOKEN = "NoExtension"  # the library's word where none can follow
EXCERPT = re.compile(r"\d+ \| ")


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A grammar at its beginning; requests share it and start from copies."""

    matcher: LLMatcher
    eos_ids: frozenset[int]

    def start(self) -> GrammarState:
        return GrammarState(self)


class GrammarState:
    """Where one sequence stands in its grammar: tokens are pushed and popped.

    A token the grammar refuses, and whatever is pushed on it, is remembered but not consumed: nothing may follow.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar, self._matcher = grammar, grammar.matcher.deep_copy()
        self._consumed: list[int] = []
        self._num_refused = 0
        self._has_old_mask = self._is_dead_end = False

    @property
    def failure(self) -> str:
        """Why nothing may follow, in one sentence; empty where something may. Of the last call of `allowed`."""
        error = self._matcher.get_error() if self._matcher.is_error() else ""
        if error and not error.startswith(NO_TOKEN):
            return f"The grammar is too complex to go on with: {_one_sentence(error)}"
        if error or self._num_refused or self._is_dead_end:
            return "The grammar led to a dead end: no token of the model may follow what was generated."
        return ""

    def push(self, token_id: int) -> None:
        self._is_dead_end = False
        if not self._num_refused and token_id not in self._grammar.eos_ids and self._consume(token_id):
            self._consumed.append(token_id)
        else:
            self._num_refused += 1

    def pop(self) -> None:
        self._is_dead_end = False
        if self._num_refused:
            self._num_refused -= 1
        else:
            self._consumed.pop()
            self._matcher.rollback(1)
            self._has_old_mask = True
        if self._matcher.is_error():  # for good, whatever is rolled back
            self._matcher, self._has_old_mask = self._grammar.matcher.deep_copy(), False
            self._matcher.consume_tokens(self._consumed)

    def _consume(self, token_id: int) -> bool:
        # The library keeps its last mask by depth and lexer state alone, and does not forget it where it is rolled back
        # (1.9.1): on another way to the same depth it would be taken for that one's. One of what is left replaces it.
        if self._has_old_mask:
            self._mask()
        return self._matcher.try_consume_tokens([token_id]) == 1

    def _mask(self) -> bytes:
        self._has_old_mask = False
        return self._matcher.compute_bitmask()

    def allowed(self, vocab_size: int, stop_ids: frozenset[int], late_ids: frozenset[int]) -> NDArray[np.uint8]:
        """(V,): 1 for each token id that may come next; ids beyond the tokenizer's are never allowed.

        `late_ids` are those of `stop_ids` that may come only where nothing else may. All 0 if a token was refused.
        """
        allowed_V = self._allowed(vocab_size, stop_ids, late_ids)
        self._is_dead_end = not allowed_V.any()
        return allowed_V

    def _allowed(self, vocab_size: int, stop_ids: frozenset[int], late_ids: frozenset[int]) -> NDArray[np.uint8]:
        allowed_V = np.zeros(vocab_size, dtype=np.uint8)
        if self._num_refused or self._matcher.is_error():
            return allowed_V
        mask = np.unpackbits(np.frombuffer(self._mask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():
            return allowed_V
        allowed_V[: len(mask)] = mask[:vocab_size]
        allowed_V[[i for i in self._grammar.eos_ids if i < vocab_size]] = 0
        may_end, text_V = self._matcher.is_accepting(), allowed_V
        if late_ids:
            allowed_V = allowed_V.copy()
            allowed_V[list(late_ids)] = 0
        if may_end:
            allowed_V[list(stop_ids - late_ids)] = 1
        if not allowed_V.any():
            allowed_V = text_V
            allowed_V[list(stop_ids) if may_end else []] = 1
        return allowed_V


class GrammarCompiler:
    """Compiles grammars for the tokenizer of a model directory. Any thread may call it.

    `eos_ids` are the model's end-of-sequence ids; a compiler that only checks grammars needs none.
    """

    def __init__(self, path: str | Path, eos_ids: Iterable[int] = ()) -> None:
        self._path, self._eos_ids = Path(path), frozenset(eos_ids)
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Raises ValueError, with one sentence that says what is wrong, for a grammar that cannot be used."""
        self.compile(grammar)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The grammar ready for use, from the cache where it was compiled before; ValueError as in `check`."""
        with self._lock:
            if found := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
                return found
        compiled = CompiledGrammar(self._matcher(grammar), self._eos_ids)  # outside the lock: it may take a second
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return compiled

    def _tokenizer(self) -> LLTokenizer:
        with self._loading:
            return self._loaded

    @cached_property
    def _loaded(self) -> LLTokenizer:
        # By the first grammar: 131,072 tokens take seconds.
        return _load(self._path, sorted(self._eos_ids))

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        name = parameter_name(grammar.kind)
        if len(grammar.text) > MAX_TEXT:
            raise ValueError(f"{name} must be at most {MAX_TEXT} characters long, not {len(grammar.text)}.")
        source = json.dumps({"grammars": [_definition(grammar, name)]})
        tokenizer = self._tokenizer()
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = _on_large_stack(lambda: LLMatcher(tokenizer, source, log_level=0, limits=limits))
        if matcher.is_error():
            raise ValueError(f"{name} cannot be used: {_one_sentence(matcher.get_error())}")
        beginning = matcher.deep_copy()
        if not any(beginning.compute_bitmask()) or beginning.is_error():
            raise ValueError(f"{name} must allow at least one answer that the model's tokens can write.")
        return matcher


def parameter_name(kind: GrammarKind) -> str:
    """The API's name of what a client gave."""
    match kind:
        case GrammarKind.JSON_OBJECT | GrammarKind.JSON_SCHEMA:
            return "response_format"
        case GrammarKind.REGEX:
            return "regex"
        case GrammarKind.LARK:
            return "grammar"


def _definition(grammar: Grammar, name: str) -> dict[str, Any]:
    """In the library's own format, where a client's text cannot be taken for anything but what `kind` says."""
    match grammar.kind:
        case GrammarKind.REGEX:
            [definition] = json.loads(LLMatcher.grammar_from_regex(grammar.text))["grammars"]
            return {"lark_grammar": definition["lark_grammar"]}
        case GrammarKind.LARK:
            return {"lark_grammar": grammar.text}
        case GrammarKind.JSON_OBJECT:
            return {"json_schema": {"type": "object"} | JSON_OPTIONS}
        case GrammarKind.JSON_SCHEMA:
            return {"json_schema": _schema(grammar.text, name) | JSON_OPTIONS}


def _schema(text: str, name: str) -> dict[str, Any]:
    try:
        schema: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold a JSON schema in JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{name} must hold a JSON schema that is an object, not {type(schema).__name__}.")
    return schema


def _on_large_stack(make: Callable[[], LLMatcher]) -> LLMatcher:
    made: Future[LLMatcher] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # the library's panics are no Exception
            made.set_exception(error)

    with _stack_size_lock:
        normal = threading.stack_size(COMPILE_STACK)
        try:
            thread = threading.Thread(target=work, name="grammar")
            thread.start()
        finally:
            threading.stack_size(normal)
    thread.join()
    return made.result()


def _one_sentence(error: str) -> str:
    """The message without the excerpts that the library draws, and without the debugging hints after them."""
    lines = [line.strip() for line in error.splitlines()]
    said = " ".join(line for line in lines if line and not set(line) <= {"^", " "} and not EXCERPT.match(line))
    return said.replace("<non-verbose/>", "").rpartition(" error: ")[2].strip().rstrip(".") + "."


def _load(path: Path, eos_ids: Sequence[int]) -> LLTokenizer:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"A grammar needs the tokenizer.json of the model directory {path}, which has none.")
    tokenizer: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return LLTokenizer(tokenizer.to_str(), eos_token=list(eos_ids) or None)
