import json
import random
import re
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import model.demo
from services.engine.contract.errors import EngineFailed
from services.engine.contract.sampling_params import MAX_COUNTED_CHARS, Grammar, GrammarKind, LogitBias, SamplingParams
from services.engine.grammar.compiled_grammar import (
    MAX_GRAMMARS,
    MAX_KEPT_STATES,
    MAX_TEXT,
    GrammarCompiler,
    _on_large_stack,
    max_lexer_states,
)
from services.engine.request import Request
from services.engine.sampling.sampler import Sampler, SamplingRow

DEMO = Path(model.demo.__file__).parent / "checkpoint"
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
EOS, IM_END, VOCAB_SIZE = 2, 4, 2100  # the vocabulary is padded, because the tokenizer has only 2,048 tokens
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "is_big": {"type": "boolean"},
    },
    "required": ["colour", "sizes", "is_big"],
    "additionalProperties": False,
}
SAMPLER = Sampler()


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(DEMO, [EOS, IM_END])


def request(kind: GrammarKind, text: str = "", stop_ids: tuple[int, ...] = (EOS, IM_END), **params: Any) -> Request:
    grammar = Grammar(kind, text)
    asked = Request("r", [1], SamplingParams(grammar=grammar, **params), seed=0, max_len=10**6)
    asked.compiled_grammar = compiler().compile(grammar)
    asked.stop_ids = frozenset(stop_ids)
    return asked


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def allowed(asked: Request, text: str = "") -> set[int]:
    """Return every token that may follow `text`: the sampler chooses such a token if its logit is the largest."""
    rows = [SamplingRow(asked, tuple(ids(text)))] * VOCAB_SIZE
    tokens = SAMPLER.sample(1000 * torch.eye(VOCAB_SIZE), rows)
    return {wanted for wanted, token in enumerate(tokens) if token and token.token_id == wanted}


def generate(asked: Request, seed: int, num_tokens: int = 200) -> str:
    """Generate an answer from random logits, as the worst possible model would, and return its text."""
    generator = torch.Generator().manual_seed(seed)
    answer: list[int] = []
    for _ in range(num_tokens):
        [sampled] = SAMPLER.sample(2 * torch.randn(1, VOCAB_SIZE, generator=generator), [SamplingRow(asked)])
        assert sampled is not None
        asked.token_ids.append(sampled.token_id)
        if sampled.token_id in asked.stop_ids:
            return str(TOKENIZER.decode(answer))
        answer.append(sampled.token_id)
    raise AssertionError(f"no end after {TOKENIZER.decode(answer)!r}")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_noise_becomes_an_answer_that_matches(seed: int, temperature: float) -> None:
    answer = generate(request(GrammarKind.REGEX, r"[a-z]{3,9}-\d{2,4}(/x)?", temperature=temperature), seed)
    assert re.fullmatch(r"[a-z]{3,9}-\d{2,4}(/x)?", answer)
    answer = generate(request(GrammarKind.LARK, 'start: "<" (A | B) ">"\nA: /a+/\nB: /b{2}/'), seed, 2000)
    assert re.fullmatch(r"<(a+|b{2})>", answer)
    found = json.loads(generate(request(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA), temperature=temperature), seed))
    assert set(found) == set(SCHEMA["properties"])  # type: ignore[call-overload]
    assert found["colour"] in ("red", "green")
    assert len(found["sizes"]) <= 3
    assert all(0 <= size <= 99 for size in found["sizes"])
    assert isinstance(found["is_big"], bool)


def test_padding_and_special_tokens_are_never_text() -> None:
    anything = allowed(request(GrammarKind.REGEX, r"(?s:.*)"), "a")
    assert EOS in anything
    assert not anything & {0, 1, 3, *range(5, 11), *range(2048, VOCAB_SIZE)}
    assert {*ids("text = 1"), ids("ü")[0]} <= anything
    assert not set(ids("ü")[1:]) & anything, "half a character must not be allowed"


def test_an_answer_ends_exactly_where_the_grammar_may() -> None:
    digits = request(GrammarKind.REGEX, "[0-9]{2,3}", stop_ids=(EOS, IM_END))
    assert not allowed(digits, "1") & {EOS, IM_END}
    assert {EOS, IM_END} < allowed(digits, "12")
    assert allowed(digits, "123") == {EOS, IM_END}


def test_stop_ids_that_are_text_end_an_answer_wherever_the_text_may_stand() -> None:
    [dot] = ids(".")
    dotted = request(GrammarKind.REGEX, r"[0-9]\.[0-9]", stop_ids=(EOS, dot))
    assert allowed(dotted, "1") == {dot}
    assert allowed(dotted, "1.5") == {EOS, dot}


def test_an_end_that_may_wait_waits_until_nothing_else_is_left() -> None:
    for asked in (
        request(GrammarKind.REGEX, "[0-9]{2,3}", ignore_eos=True),
        request(GrammarKind.REGEX, "[0-9]{2,3}", min_tokens=50),
    ):
        assert not allowed(asked, "12") & {EOS, IM_END}
        assert allowed(asked, "123") == {EOS, IM_END}
        assert re.fullmatch("[0-9]{3}", generate(asked, seed=1))


def test_json_cannot_go_on_with_spaces_for_ever() -> None:
    asked = request(GrammarKind.JSON_OBJECT)
    spaces = {*ids(" "), *ids("\n"), *ids("\t")}
    assert set(ids(" ")) | set(ids("\n")) <= allowed(asked, "{")
    assert not spaces & allowed(asked, "{ ")
    assert not spaces & allowed(asked, "{\n" + 16 * " ")
    assert ids('"')[0] in allowed(asked, '{\n    "a": [\n        1,\n        2\n    ],\n    ')


def test_rows_with_guesses_ahead_leave_no_trace() -> None:
    text = '{"a": [1, {"b": null}], "c": "d"}'
    asked, generator = request(GrammarKind.JSON_OBJECT), torch.Generator().manual_seed(0)
    for position, token_id in enumerate(ids(text)):
        right, wrong = ids(text)[position : position + 4], [*ids(text)[position : position + 2], 1]
        logits = torch.randn(6, VOCAB_SIZE, generator=generator)
        rows = [SamplingRow(asked, tuple(ahead)) for ahead in (right[:1], wrong, right, [], right[:2], wrong[:-1])]
        fresh = [request(GrammarKind.JSON_OBJECT) for _ in rows]
        for each in fresh:
            each.token_ids += ids(text)[:position]
        found = SAMPLER.sample(logits, rows)
        assert found == SAMPLER.sample(logits, [SamplingRow(r, row.ahead) for r, row in zip(fresh, rows, strict=True)])
        assert found[1] is None, "nothing may follow a token that the grammar refuses"
        assert None not in found[:1] + found[2:]
        asked.token_ids.append(token_id)
    [last] = SAMPLER.sample(torch.randn(1, VOCAB_SIZE, generator=generator), [SamplingRow(asked)])
    assert last is not None
    assert last.token_id in (EOS, IM_END)


def test_nothing_follows_a_guessed_end() -> None:
    asked = request(GrammarKind.REGEX, "a+")
    rows = [SamplingRow(asked, (*ids("a"), EOS)), SamplingRow(asked, tuple(ids("a")))]
    ended, going = SAMPLER.sample(torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)), rows)
    assert ended is None
    assert going is not None


def test_a_grammar_leaves_the_other_rows_alone() -> None:
    logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).expand(3, -1).contiguous()
    free = Request("free", [1], SamplingParams(temperature=0), seed=0, max_len=99)
    rows = [SamplingRow(free), SamplingRow(request(GrammarKind.REGEX, "[0-9]", temperature=0)), SamplingRow(free)]
    tokens = [sampled and sampled.token_id for sampled in SAMPLER.sample(logits, rows)]
    assert tokens[0] == tokens[2] == int(logits[0].argmax())
    assert str(TOKENIZER.decode([tokens[1]])).isdigit()


def test_a_grammar_that_becomes_too_complex_fails_its_own_row_and_says_why() -> None:
    many = "start: " + " | ".join(['"a"'] * 3000)  # the library can read an "a" in too many ways
    rows = [SamplingRow(request(GrammarKind.LARK, many), tuple(ids("a"))), SamplingRow(request(GrammarKind.REGEX, "a"))]
    failed, fine = SAMPLER.sample(torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)), rows)
    assert failed is None
    why = SAMPLER.explain(rows[0].request)
    assert isinstance(why, ValueError), "a failure of the client's grammar is not a failure of the engine"
    assert str(why).startswith("The grammar is too complex to continue: Parser Error: Current row has 3001 items")
    assert "\n" not in str(why)
    assert fine is not None
    assert isinstance(SAMPLER.explain(rows[1].request), EngineFailed)
    [before] = SAMPLER.sample(torch.zeros(1, VOCAB_SIZE), [SamplingRow(rows[0].request)])
    assert before is not None, "the grammar became too complex only after a draft, so other tokens may still follow"
    assert before.token_id == ids("a")[0]


@pytest.mark.parametrize(
    "text",
    [
        'start: "x" NOTHING\nNOTHING: /a/ & /b/',
        f'start: "x" <[{EOS}]> "y"',  # the grammar requires an end-of-sequence token, which has no text, in the middle
    ],
    ids=["unmatchable", "end in the middle"],
)
def test_a_grammar_that_leads_nowhere_is_the_clients_fault_in_one_sentence(text: str) -> None:
    asked = request(GrammarKind.LARK, text)
    row, failed = SamplingRow(asked), None
    for _ in range(2):
        [failed] = SAMPLER.sample(torch.zeros(1, VOCAB_SIZE), [row])
        if failed is None:
            break
        asked.token_ids.append(failed.token_id)
    assert failed is None
    why = SAMPLER.explain(asked)
    assert isinstance(why, ValueError)
    assert re.fullmatch(r"The grammar (led to a dead end: |is too complex to continue: )[^\n]+\.", str(why))


@pytest.mark.parametrize("ends", [{"min_tokens": 50}, {"ignore_eos": True}, {"min_tokens": 50, "ignore_eos": True}])
@pytest.mark.parametrize("bias", [LogitBias(), LogitBias.of({EOS: -100.0, IM_END: -100.0})])
@pytest.mark.parametrize("stop_ids", [(EOS, IM_END), (EOS,)])
def test_a_complete_grammar_ends_whatever_else_was_asked_for(
    ends: dict[str, Any], bias: LogitBias, stop_ids: tuple[int, ...]
) -> None:
    asked = request(GrammarKind.REGEX, "[0-9]{3}", stop_ids, logit_bias=bias, stop_token_ids=stop_ids, **ends)
    assert re.fullmatch("[0-9]{3}", generate(asked, seed=0))


def test_what_was_guessed_on_another_way_to_the_same_depth_says_nothing_of_this_one() -> None:
    text = request(GrammarKind.JSON_OBJECT)
    in_list, in_key = ids('{"a": ["'), ids('{"a": {"')
    assert len(SAMPLER.sample(torch.zeros(1, VOCAB_SIZE), [SamplingRow(text, tuple(in_list))])) == 1
    assert allowed(text, '{"a": {"') == allowed(request(GrammarKind.JSON_OBJECT), '{"a": {"')
    [colon] = ids('":')
    assert colon in allowed(text, '{"a": {"')
    assert colon not in allowed(text, '{"a": ["')
    assert in_list != in_key


GUIDED = [  # no lexemes with max_tokens or stop, because the library cannot roll such lexemes back
    'start: "<" t ">"\nt[max_tokens=9]: /[a-z]+/',
    'start: "<" t ">"\nt[stop="q"]: /[a-z]+/',
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("grammar", [Grammar(GrammarKind.JSON_OBJECT), *(Grammar(GrammarKind.LARK, g) for g in GUIDED)])
def test_after_any_guesses_a_state_is_that_of_its_tokens(grammar: Grammar, seed: int) -> None:
    draw, compiled = random.Random(seed), compiler().compile(grammar)
    state, tokens, stops = compiled.start(), list[int](), frozenset({EOS})
    telling = ids('{"a": ["b", {"": {"c": ["q') + ids(">") + ids("}")
    for _ in range(400):
        fresh = compiled.start()
        for token in tokens:
            fresh.push(token)
        may_follow = fresh.allowed(VOCAB_SIZE, stops, frozenset())
        if draw.random() < 0.7:
            assert np.array_equal(state.allowed(VOCAB_SIZE, stops, frozenset()), may_follow)
        for _ in range(min(len(tokens), draw.choice((0, 0, 0, 0, 1, 2, 3)))):
            state.pop()
            tokens.pop()
            may_follow = None
        if may_follow is None:
            continue
        good = [int(i) for i in may_follow.nonzero()[0] if i != EOS]
        some = [i for i in telling if may_follow[i]] if draw.random() < 0.9 else good
        token = draw.choice(telling) if draw.random() < 0.1 or not good else draw.choice(some or good)
        state.push(token)
        tokens.append(token)


# Grammars with mistakes of a client


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (GrammarKind.REGEX, "[0-9", "regex cannot be used: unclosed character class."),
        (GrammarKind.REGEX, "(?=a)b", "regex cannot be used: look-around, .* is not supported."),
        (GrammarKind.REGEX, "(" * 9999 + ")" * 9999, "regex cannot be used: .*nest.*"),
        (GrammarKind.LARK, "start: foo", 'grammar cannot be used: at 1\\(8\\): unknown name: "foo".'),
        (GrammarKind.LARK, "nonsense", "grammar cannot be used: .+"),
        (GrammarKind.LARK, "", "grammar cannot be used: no start rule found."),
        (GrammarKind.LARK, "start: start", "grammar must allow at least one answer .*"),
        (GrammarKind.LARK, "start: " + "(" * 30_000 + ")" * 30_000, "grammar cannot be used: .* too deeply nested .*"),
        (GrammarKind.LARK, "/" * (MAX_TEXT + 1), f"grammar must be at most {MAX_TEXT} characters long, not .*"),
        (GrammarKind.JSON_SCHEMA, '{"type": "objekt"}', "response_format cannot be used: Invalid type: objekt."),
        (GrammarKind.JSON_SCHEMA, '{"not": {}, "if": {}}', "response_format cannot be used: Unimplemented keys: .*"),
        (GrammarKind.JSON_SCHEMA, '{"enum": []}', "response_format cannot be used: Unsatisfiable schema: .*"),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "http://localhost/"}', "response_format cannot be used: .*"),
        (GrammarKind.JSON_SCHEMA, "[]", "response_format must hold a JSON schema that is an object, not list."),
        (GrammarKind.JSON_SCHEMA, '{"type":', "response_format must hold a JSON schema in JSON: .*"),
        (GrammarKind.JSON_SCHEMA, "[" * 60_000, "response_format must hold a JSON schema in JSON: .*"),
        (GrammarKind.JSON_SCHEMA, '{"a":' * 500 + "1" + "}" * 500, "response_format cannot be used: .*recursion .*"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_grammar_that_cannot_be_used_is_refused_in_one_sentence(kind: GrammarKind, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$") as refusal:
        compiler().check(Grammar(kind, text))
    assert "\n" not in str(refusal.value)


def test_a_model_without_a_tokenizer_has_no_grammars(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"A grammar needs the tokenizer.json of the model directory .*, which has none."
    ):
        GrammarCompiler(tmp_path).check(Grammar(GrammarKind.JSON_OBJECT))


@pytest.mark.parametrize(
    "text",
    [
        "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(7000)) + 'r7000: "a"',
        json.dumps({"$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)} | {"3000": {}}}),
        json.dumps(
            {
                "$ref": "#/$defs/0",
                "$defs": {str(i): {"properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(2000)}
                | {"2000": {}},
            }
        ),
    ],
    ids=["rules", "references", "properties"],
)
def test_a_long_chain_of_rules_does_not_end_the_process(text: str) -> None:
    grammar = Grammar(GrammarKind.JSON_SCHEMA if text.startswith("{") else GrammarKind.LARK, text)
    assert compiler().compile(grammar).start().allowed(VOCAB_SIZE, frozenset({EOS}), frozenset()).any()


def test_compiled_grammars_are_kept_and_only_so_many() -> None:
    few = GrammarCompiler(DEMO, [EOS])
    first = few.compile(Grammar(GrammarKind.REGEX, "first"))
    assert few.compile(Grammar(GrammarKind.REGEX, "first")) is first
    for n in range(MAX_GRAMMARS - 1):
        few.compile(Grammar(GrammarKind.REGEX, f"a{n}"))
    assert few.compile(Grammar(GrammarKind.REGEX, "first")) is first
    for n in range(MAX_GRAMMARS):
        few.compile(Grammar(GrammarKind.REGEX, f"b{n}"))
    assert few.compile(Grammar(GrammarKind.REGEX, "first")) is not first


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.LARK, 'start: "<|im_end|>x"'),
        (GrammarKind.REGEX, "<tool_call>x"),
        (GrammarKind.JSON_SCHEMA, '{"const": "</think>x"}'),
    ],
)
def test_the_name_of_a_special_token_in_a_text_is_spelled_with_other_tokens(kind: GrammarKind, text: str) -> None:
    answer = generate(request(kind, text), seed=0)
    assert answer == {"L": "<|im_end|>x", "R": "<tool_call>x", "J": '"</think>x"'}[kind.name[0]]


def test_kept_grammars_take_less_than_a_gigabyte() -> None:
    assert MAX_KEPT_STATES * 2048 < 1 << 30
    few = GrammarCompiler(DEMO, [EOS])
    grammars = [Grammar(GrammarKind.REGEX, f"a{n}", MAX_COUNTED_CHARS) for n in range(4)]
    most = MAX_KEPT_STATES // max_lexer_states(grammars[0])
    assert 1 <= most < len(grammars)
    long = [few.compile(grammar) for grammar in grammars[: most + 1]]
    assert few.compile(grammars[most]) is long[most]
    assert few.compile(grammars[0]) is not long[0]


def test_what_goes_wrong_on_the_large_stack_is_carried_over() -> None:
    def fail() -> Any:
        raise MemoryError("no room for a grammar")

    with pytest.raises(MemoryError, match="no room for a grammar"):
        _on_large_stack(fail)


def test_threads_share_a_compiler() -> None:
    failures = []

    def work(number: int) -> None:
        for n in range(40):
            state = compiler().compile(Grammar(GrammarKind.REGEX, f"x{n % 7}")).start()
            state.push(ids("x")[0])
            if state.allowed(VOCAB_SIZE, frozenset(), frozenset()).nonzero()[0].tolist() != ids(str(n % 7)):
                failures.append((number, n))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
