"""A `GrammarCompiler` compiles grammars, and a `GrammarState` says which tokens a grammar allows next in an answer.

When a request arrives, `GrammarCompiler.check` refuses a grammar that cannot be used. `GrammarCompiler.compile` runs on
a separate thread before the request reaches the engine, because a large schema takes up to a second:

    request.compiled_grammar = await asyncio.to_thread(compiler.compile, params.grammar)

How an answer ends:

- An end-of-sequence token is a stop id without text. Such a stop id is allowed exactly where the grammar may end. If
  the grammar can only end, no other token is allowed.
- A stop id with ordinary text is allowed wherever the grammar allows the text.
- So a request with a grammar needs the model's end-of-sequence ids among its `stop_ids` even if it sets `ignore_eos`.
  For such a request `ignore_eos` means that the answer ends only where the grammar allows no other token.
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

_stack_size_lock = threading.Lock()  # guards `threading.stack_size`, which applies to all new threads of the process

# Largest number of compiled grammars in the cache. A lexer state takes at most 2 kB, so the cache takes at most 640 MB.
MAX_GRAMMARS = 16
MAX_LEXER_STATES = 20_000  # for a grammar that counts no characters
# Additional states for each character that a grammar counts: 6 for English text, 12 for text of all scripts with
# escapes, and 15 for a class such as \S. A grammar that may have more states takes the place of several
# grammars in the cache.
STATES_PER_CHAR = 16
MAX_KEPT_STATES = MAX_GRAMMARS * MAX_LEXER_STATES
MAX_TEXT = 2**17  # largest number of characters of a grammar
# Bytes of stack for the library, which recurses. The longest chain of rules that MAX_TEXT allows needs 2**26 bytes.
COMPILE_STACK = 2**29
NO_TOKEN = "NoExtension"  # beginning of the library's error message when no token can follow
# Without this option, where only one text may follow, the library allows only the tokens into which the tokenizer
# divides this text. If the text contains the name of a special token, the only allowed token would be the special
# token, which the grammar refuses.
OPTIONS = '\n%llguidance {"no_forcing": true}\n'
# beginning of an error with a position in the grammar's text, which this server wrote and the client does not know
SCHEMA_PLACE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
# The library's sentence recommends an option that clients do not have; clients get the second sentence instead.
ONE_OF = (
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf",
    "oneOf is supported only if no value can match two of its options",
)
EXCERPT = re.compile(r"\d+ \| ")  # beginning of a line of an error message in which the library quotes the grammar


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A `CompiledGrammar` holds the matcher of a grammar before the first token; each request copies the matcher."""

    matcher: LLMatcher
    eos_ids: frozenset[int]

    def start(self) -> GrammarState:
        """Return the grammar's state before the first token of an answer."""
        return GrammarState(self)


class GrammarState:
    """A `GrammarState` follows the tokens of one answer through a grammar; tokens can be pushed and popped.

    If the grammar refuses a token, the state counts this token and every later token, but the matcher does not consume
    the tokens. Until all counted tokens are popped, `allowed` allows no token.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar, self._matcher = grammar, grammar.matcher.deep_copy()
        self._consumed: list[int] = []
        self._num_refused = 0
        self._has_old_mask = self._is_dead_end = False

    @property
    def failure(self) -> str:
        """Return a sentence that says why the last call of `allowed` allowed no token, or "" if it allowed a token."""
        error = self._matcher.get_error() if self._matcher.is_error() else ""
        if error and not error.startswith(NO_TOKEN):
            return f"The grammar is too complex to continue: {_one_sentence(error)}"
        if error or self._num_refused or self._is_dead_end:
            return "The grammar led to a dead end: no token of the model may follow what was generated."
        return ""

    def push(self, token_id: int) -> None:
        """Add a token at the end of the answer."""
        self._is_dead_end = False
        if not self._num_refused and token_id not in self._grammar.eos_ids and self._consume(token_id):
            self._consumed.append(token_id)
        else:
            self._num_refused += 1

    def pop(self) -> None:
        """Remove the last token of the answer."""
        self._is_dead_end = False
        if self._num_refused:
            self._num_refused -= 1
        else:
            self._consumed.pop()
            self._matcher.rollback(1)
            self._has_old_mask = True
        if self._matcher.is_error():  # a rollback does not clear an error, so a new matcher is needed
            self._matcher, self._has_old_mask = self._grammar.matcher.deep_copy(), False
            self._matcher.consume_tokens(self._consumed)

    def _consume(self, token_id: int) -> bool:
        # The library (1.9.1) caches its last mask with depth and lexer state as the only key, and a rollback does not
        # clear the cache. After different tokens of the same depth, the library would use the old mask. Computing a new
        # mask replaces the old mask.
        if self._has_old_mask:
            self._mask()
        return self._matcher.try_consume_tokens([token_id]) == 1

    def _mask(self) -> bytes:
        self._has_old_mask = False
        return self._matcher.compute_bitmask()

    def allowed(self, vocab_size: int, stop_ids: frozenset[int], late_ids: frozenset[int]) -> NDArray[np.uint8]:
        """Return a mask (V,) with 1 for each token id that may come next.

        - `stop_ids`: the request's stop ids.
        - `late_ids`: the stop ids that are allowed only if no other token is allowed.

        Ids that are not in the tokenizer's vocabulary are never allowed. The mask is all 0 if a token was refused.
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
    """A `GrammarCompiler` compiles grammars for the tokenizer of a model directory; any thread may call it.

    `eos_ids` are the model's end-of-sequence ids. This argument may be left out if the compiler only checks grammars.
    """

    def __init__(self, path: str | Path, eos_ids: Iterable[int] = ()) -> None:
        self._path, self._eos_ids = Path(path), frozenset(eos_ids)
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Raise ValueError if a grammar cannot be used; the error's text is one sentence that says what is wrong."""
        self.compile(grammar)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Return the compiled grammar, if possible from the cache; raise ValueError if the grammar cannot be used."""
        with self._lock:
            if found := self._compiled.get(grammar):
                self._compiled.move_to_end(grammar)
                return found
        compiled = CompiledGrammar(self._matcher(grammar), self._eos_ids)  # without the lock, because compiling is slow
        with self._lock:
            self._compiled[grammar] = compiled
            while sum(map(max_lexer_states, self._compiled)) > MAX_KEPT_STATES:
                self._compiled.popitem(last=False)
        return compiled

    def _tokenizer(self) -> LLTokenizer:
        with self._loading:
            return self._loaded

    @cached_property
    def _loaded(self) -> LLTokenizer:
        # The tokenizer is loaded with the first grammar, because loading 131,072 tokens takes seconds.
        return _load(self._path, sorted(self._eos_ids))

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        name = parameter_name(grammar.kind)
        if len(grammar.text) > MAX_TEXT:
            raise ValueError(f"{name} must be at most {MAX_TEXT} characters long, not {len(grammar.text)}.")
        source = json.dumps({"grammars": [_definition(grammar, name)]})
        tokenizer = self._tokenizer()
        limits = LLParserLimits(max_lexer_states=max_lexer_states(grammar), verbose_errors=False)
        matcher = _on_large_stack(lambda: LLMatcher(tokenizer, source, log_level=0, limits=limits))
        if matcher.is_error():
            raise ValueError(f"{name} cannot be used: {_one_sentence(matcher.get_error())}")
        beginning = matcher.deep_copy()
        if not any(beginning.compute_bitmask()) or beginning.is_error():
            raise ValueError(f"{name} must allow at least one answer that the model's tokens can write.")
        return matcher


def max_lexer_states(grammar: Grammar) -> int:
    """Return the largest number of states that the lexer of a grammar may have."""
    return MAX_LEXER_STATES + STATES_PER_CHAR * grammar.num_counted


def parameter_name(kind: GrammarKind) -> str:
    """Return the name of the API parameter in which a client gives a grammar of this kind."""
    match kind:
        case GrammarKind.JSON_OBJECT | GrammarKind.JSON_SCHEMA:
            return "response_format"
        case GrammarKind.REGEX:
            return "regex"
        case GrammarKind.LARK:
            return "grammar"


def _definition(grammar: Grammar, name: str) -> dict[str, Any]:
    """Return a grammar in the library's JSON format: the key of the JSON object names the syntax of the text."""
    match grammar.kind:
        case GrammarKind.REGEX:
            [definition] = json.loads(LLMatcher.grammar_from_regex(grammar.text))["grammars"]
            return {"lark_grammar": definition["lark_grammar"] + OPTIONS}
        case GrammarKind.LARK:
            return {"lark_grammar": grammar.text + OPTIONS}
        case GrammarKind.JSON_OBJECT:
            return {"lark_grammar": _json({"type": "object"}) + OPTIONS}
        case GrammarKind.JSON_SCHEMA:
            return {"lark_grammar": _json(_schema(grammar.text, name)) + OPTIONS}


def _json(schema: dict[str, Any]) -> str:
    return f"start: %json {json.dumps(schema | JSON_OPTIONS)}"


def _schema(text: str, name: str) -> dict[str, Any]:
    try:
        schema: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold a JSON schema in JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{name} must hold a JSON schema that is an object, not {type(schema).__name__}.")
    return schema


def _on_large_stack(make: Callable[[], LLMatcher]) -> LLMatcher:
    """Call `make` on a new thread whose stack has COMPILE_STACK bytes, and return the result."""
    made: Future[LLMatcher] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # errors of the library's Rust code (panics) do not derive from Exception
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
    """Return the library's error message as one sentence, without quotes of the grammar and debugging hints."""
    lines = [line.strip() for line in error.splitlines()]
    said = " ".join(line for line in lines if line and not set(line) <= {"^", " "} and not EXCERPT.match(line))
    said = said.replace("<non-verbose/>", "").rpartition(" error: ")[2].strip().rstrip(".")
    return SCHEMA_PLACE.sub("", said).replace(*ONE_OF) + "."


def _load(path: Path, eos_ids: Sequence[int]) -> LLTokenizer:
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"A grammar needs the tokenizer.json of the model directory {path}, which has none.")
    tokenizer: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return LLTokenizer(tokenizer.to_str(), eos_token=list(eos_ids) or None)
