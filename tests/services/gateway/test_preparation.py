"""The tests check that preparing a request costs little, whatever `n`, the prompts and the parameters are."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from model.demo import DEMO
from services.engine.contract.sampling_defaults import SamplingDefaults
from services.gateway.bounded_thread_pool import BoundedThreadPool
from services.gateway.chat.choice_request import ChoiceRequest
from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.chat.tools import Tool, ToolMode, ToolUse
from services.gateway.errors import ApiError
from services.gateway.generation import Generation, ModelCard
from services.gateway.generation_request import GenerationRequest
from services.gateway.limits import MIN_TOKENIZE_TOKENS
from services.gateway.preparation import INLINE_CHARS, PIECE_CHARS
from tests.services.gateway.echo import EchoSource

LEN = 1000
USER = ChatMessage("user", "hi")
ARRAY = {"type": "array"}
CHAT = Conversation((USER,))


@pytest.fixture
def generation(source: EchoSource, tokenizer: Tokenizer) -> Generation:
    return Generation(source, tokenizer, ModelCard("echo", LEN, 1))


def prepare(generation: Generation, *prompts: Any, **given: Any) -> list[ChoiceRequest]:
    return asyncio.run(generation.prepare(GenerationRequest(prompts[0], more_prompts=prompts[1:], **given)))


def test_choices_share_everything_but_the_seed(generation: Generation) -> None:
    sampling = {"logit_bias": {str(n): 1.0 for n in range(200)}, "stop": ("x", "y"), "seed": 3, "max_tokens": 5}
    choices = prepare(generation, "abc", "de", sampling=sampling, n=64)
    assert len(choices) == 128
    first = choices[0]
    assert {id(choice.params.logit_bias) for choice in choices} == {id(first.params.logit_bias)}
    assert {id(choice.stops) for choice in choices} == {id(first.stops)}
    assert {id(choice.prompt_token_ids) for choice in choices[:64]} == {id(first.prompt_token_ids)}
    assert len({choice.params.seed for choice in choices[:64]}) == 64
    assert [choice.params.seed for choice in choices[:64]] == [choice.params.seed for choice in choices[64:]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 129}, "n must be 1 to 128, not 129."),
        ({"n": 65}, "n times the number of prompts must be at most 128, not 130."),
        ({"sampling": {"logit_bias": dict.fromkeys(range(1025), 1.0)}}, "logit_bias must hold at most 1024 tokens, no"),
        ({"sampling": {"stop": ("a",) * 5}}, "stop must hold at most 4 strings, not 5."),
        ({"sampling": {"stop": ("a" * 1025,)}}, "stop must hold strings of at most 1024 bytes, not 1025."),
        ({"sampling": {"logit_bias": {"1" * 5000: 1.0}}}, "logit_bias must be keyed by token ids as strings, not '11"),
        ({"prompt": Conversation((USER,) * 16_385)}, "messages must hold at most 16384 messages, not 16385."),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be 1 to 999, or -1 for all that fit, not 0."),
        ({"truncate_prompt_tokens": LEN}, "truncate_prompt_tokens must be 1 to 999, or -1 for all that fit, not 1000."),
    ],
)
def test_cheap_checks_come_before_the_prompts(generation: Generation, given: dict[str, Any], message: str) -> None:
    too_long = "a" * LEN  # would be refused itself
    prompts = [given.pop("prompt")] if "prompt" in given else [too_long, too_long]
    with pytest.raises(ValueError, match=r".*") as error:
        prepare(generation, *prompts, **given)
    assert str(error.value).startswith(message)


def test_an_answer_gets_the_room_that_the_prompt_leaves(generation: Generation) -> None:
    def lengths(num_prompt: int, **sampling: int) -> tuple[int | None, int]:
        [choice] = prepare(generation, "a" * num_prompt, sampling=sampling)
        return choice.params.max_tokens, choice.params.min_tokens

    assert lengths(990) == (10, 0)
    assert lengths(990, max_tokens=10**12) == (10, 0)
    assert lengths(990, min_tokens=500) == (10, 10)
    assert lengths(990, max_tokens=-1) == (None, 0)
    assert lengths(10) == (16, 0)
    with pytest.raises(ApiError) as refused:
        prepare(generation, "a" * LEN)
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.message.startswith("This model's maximum context length is 1000 tokens. However, your prompt")


def test_the_models_defaults_are_used_for_what_a_client_leaves_out(source: EchoSource, tokenizer: Tokenizer) -> None:
    defaults = SamplingDefaults({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}, max_new_tokens=50)
    generation = Generation(source, tokenizer, ModelCard("echo", LEN, 1), defaults=defaults)
    [choice] = prepare(generation, "abc", sampling={"top_p": 1.0, "max_tokens": 9})
    params = choice.params
    assert (params.temperature, params.top_p, params.repetition_penalty, params.max_tokens) == (0.6, 1.0, 1.1, 9)

    def max_tokens(prompt: Any, **sampling: int) -> int | None:
        return prepare(generation, prompt, sampling=sampling)[0].params.max_tokens

    user = Conversation((ChatMessage("user", "hi"),))
    assert [max_tokens(user), max_tokens(user, max_tokens=70), max_tokens(user, max_tokens=-1)] == [50, 50, 50]
    assert [max_tokens("abc"), max_tokens("abc", max_tokens=70), max_tokens("a" * 990)] == [16, 50, 10]


@pytest.mark.parametrize(
    ("keep", "sampling", "num_left"),
    [
        (5, {}, 5),
        (2000 - LEN - 1, {}, 999),
        (-1, {}, 984),
        (-1, {"max_tokens": 100}, 900),
        (-1, {"max_tokens": 5000}, 1),
    ],
)
def test_truncated_prompts_keep_their_end(
    generation: Generation, keep: int, sampling: dict[str, int], num_left: int
) -> None:
    prompt = "x" * 1995 + "abcde"
    for given in (prompt, [ord(char) - 33 for char in prompt]):
        [choice] = prepare(generation, given, sampling=sampling, truncate_prompt_tokens=keep, echo=True)
        assert len(choice.prompt_token_ids) == num_left
        assert choice.echo == prompt[-num_left:]


def chat(*messages: ChatMessage, **given: Any) -> Conversation:
    return Conversation(messages, add_generation_prompt=False, continue_final_message=True, **given)


@pytest.mark.parametrize(
    ("last", "prompt", "in_reasoning"),
    [
        (ChatMessage("assistant", "I am"), "<think></think>I am", False),
        (ChatMessage("assistant", "I am "), "<think></think>I am ", False),
        (ChatMessage("assistant", "<think>\nLet"), "<think>\nLet", True),
        (ChatMessage("assistant", "", reasoning="Let"), "<think>\nLet", True),
        (ChatMessage("assistant", "I am", reasoning="Let"), "<think>\nLet</think>I am", False),
    ],
)
def test_an_answer_continues_the_final_message(last: ChatMessage, prompt: str, in_reasoning: bool) -> None:
    demo = Tokenizer(DEMO)
    generation = Generation(EchoSource(0), demo, ModelCard("demo", LEN, 1))
    [choice] = prepare(generation, chat(USER, last))
    assert demo.decode(choice.prompt_token_ids) == f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{prompt}"
    assert choice.in_reasoning is in_reasoning


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (chat(USER), "continue_final_message needs a last message of the assistant without tool_calls."),
        (
            replace(chat(USER), add_generation_prompt=True),
            "continue_final_message may not be true together with add_generation_prompt.",
        ),
        (
            chat(USER, ChatMessage("assistant", "x", tool_calls=(PastCall("1", "f", "{}"),))),
            "continue_final_message needs a last message of the assistant without tool_calls.",
        ),
        (Conversation(()), "messages must hold at least one message."),
    ],
)
def test_messages_that_cannot_be_continued(generation: Generation, prompt: Conversation, message: str) -> None:
    with pytest.raises(ValueError, match=r".*") as error:
        prepare(generation, prompt)
    assert str(error.value) == message


def test_a_template_that_changes_the_final_message(generation: Generation, tokenizer: Tokenizer) -> None:
    hf: Any = tokenizer._hf
    template, hf.chat_template = hf.chat_template, "{% for m in messages %}{{ m.content[:3] }}{% endfor %}"
    try:
        with pytest.raises(ValueError, match="continue_final_message may not be true, because the model's chat templ"):
            prepare(generation, chat(USER, ChatMessage("assistant", "a long one")))
    finally:
        hf.chat_template = template


def test_no_generation_prompt() -> None:
    demo = Tokenizer(DEMO)
    generation = Generation(EchoSource(0), demo, ModelCard("demo", LEN, 1))
    [choice] = prepare(generation, Conversation((USER,), add_generation_prompt=False))
    assert demo.decode(choice.prompt_token_ids) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("thinking", "sampling", "budget"),
    [
        (Thinking("low"), {}, 493),
        (Thinking("low"), {"max_tokens": 100}, 50),
        (Thinking(token_budget=7), {}, 7),
        (Thinking(token_budget=5000), {}, None),
        (Thinking(), {}, None),
    ],
)
def test_budgets_of_reasoning_leave_room(thinking: Thinking, sampling: dict[str, int], budget: int | None) -> None:
    demo = Tokenizer(DEMO)
    generation = Generation(EchoSource(0), demo, ModelCard("demo", LEN, 1))
    reasons = Conversation((USER,), template_kwargs={"enable_thinking": True})
    [choice] = prepare(generation, reasons, sampling=sampling, thinking=thinking)
    given = choice.params.thinking_budget
    assert (given and given.max_tokens) == budget
    assert given is None or given.end_ids == demo.marker_ids("</think>")
    [choice] = prepare(generation, Conversation((USER,)), sampling=sampling, thinking=thinking)
    assert choice.params.thinking_budget is None


def test_logprobs_of_prompts_are_limited(generation: Generation) -> None:
    allowed = {"sampling": {"prompt_logprobs": 0}, "n": 48}
    assert len(prepare(generation, "a" * 999, **allowed)) == 48
    with pytest.raises(ValueError, match=r"prompt_logprobs .* at most 49152 logprobs, .*, not 95904\."):
        prepare(generation, "a" * 999, **(allowed | {"sampling": {"prompt_logprobs": 1}}))


def test_no_schema_blocks_the_event_loop(generation: Generation) -> None:
    itself = {"anyOf": [{"$ref": "#/properties/x"}] * 200 + [{"type": "integer"}]}
    shared = {"Big": {"type": "object", "properties": {f"k{n}": {"enum": ["x" * 99, n]} for n in range(900)}}}
    lists = {f"p{n}": {"type": "array", "items": {"$ref": "#/$defs/Big"}, "maxItems": n} for n in range(500)}
    doubling = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(100)}
    chain: dict[str, Any] = {f"c{n}": {"allOf": [{"$ref": f"#/$defs/c{n + 1}"}]} for n in range(1300)}
    nested: dict[str, Any] = {"type": "string", "pattern": "a"}
    for _ in range(60):
        nested = {"allOf": [nested]}
    schemas: list[dict[str, Any]] = [
        {"properties": {"x": itself}},
        {"properties": {"x": {"type": "array", "items": itself}}},
        {"properties": lists, "$defs": shared},
        {"properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": doubling},
        {
            "properties": {"x": {"type": "array", "items": {"$ref": "#/$defs/d0"}, "uniqueItems": True}},
            "$defs": doubling,
        },
        {"properties": {"x": {"type": "string", "not": {"$ref": "#/$defs/d0"}}}, "$defs": doubling},
        {"properties": {"x": {"$ref": "#/$defs/c0"}, "y": {"type": "null"} | {"$ref": "#/$defs/c0"}}, "$defs": chain},
        {"properties": {"x": {"not": {"$ref": "#/$defs/c0"}} | ARRAY}, "$defs": chain},
        {"properties": {"x": {"items": nested} | ARRAY, "y": {"type": "string", "allOf": [nested]}}},
        {"properties": {"x": {"not": nested} | ARRAY, "y": {"type": "string", "not": nested}}},
    ]

    async def longest_pause() -> float:
        """Return the longest processor time of the event loop's thread between two turns of another task."""
        longest, is_done = 0.0, asyncio.Event()

        async def watch() -> None:
            nonlocal longest
            while not is_done.is_set():
                before = time.thread_time()
                await asyncio.sleep(0.005)
                longest = max(longest, time.thread_time() - before)

        watching = asyncio.create_task(watch())
        for schema in schemas:
            use = ToolUse((Tool("f", parameters={"type": "object", **schema}),), ToolMode.REQUIRED)
            [choice] = await generation.prepare(GenerationRequest(CHAT, tool_use=use))
            assert choice.params.grammar is not None
        is_done.set()
        await watching
        return longest

    assert asyncio.run(longest_pause()) < 1.0  # usually 0.2 s


def test_only_the_beginning_of_a_much_too_long_prompt_is_tokenized(
    generation: Generation, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_chars: list[int] = []
    encode = Tokenizer.encode

    def counting(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        num_chars.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    with pytest.raises(ApiError, match=r"However, your prompt resulted in more than 1000 tokens\.") as refused:
        prepare(generation, "a" * 10**6)
    assert refused.value.code == "context_length_exceeded"
    assert num_chars == [PIECE_CHARS]
    [choice] = prepare(generation, "a" * MIN_TOKENIZE_TOKENS, truncate_prompt_tokens=3)
    assert len(choice.prompt_token_ids) == 3


def test_the_tokens_of_a_text_are_bounded_before_the_text_is_tokenized_at_once(
    generation: Generation, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_chars: list[int] = []
    encode = Tokenizer.encode

    def counting(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        num_chars.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    long = "a" * 10**6
    chat = Conversation((ChatMessage("user", long),))
    for request in (GenerationRequest(long), GenerationRequest(chat)):
        with pytest.raises(ApiError, match=r"must have at most 65536 tokens to be tokenized"):
            asyncio.run(generation.tokenize(request, add_special_tokens=False))
        assert asyncio.run(generation.num_tokens(request, most=70_000)) == 70_001
    with pytest.raises(ApiError, match=r"^prompt must have at most 65536 tokens"):
        prepare(generation, long, truncate_prompt_tokens=3)
    assert set(num_chars) == {PIECE_CHARS}
    for num_tokens in (65_536, 65_537):  # texts that are tokenized at once
        request = GenerationRequest("a" * num_tokens)
        assert asyncio.run(generation.num_tokens(request, most=10)) == num_tokens
        if num_tokens == 65_536:
            assert len(asyncio.run(generation.tokenize(request, add_special_tokens=False))) == num_tokens
        else:
            with pytest.raises(ApiError, match=r"^prompt must have at most 65536 tokens"):
                asyncio.run(generation.tokenize(request, add_special_tokens=False))


def test_a_long_text_of_long_tokens_is_tokenized(generation: Generation, tokenizer: Tokenizer) -> None:
    """Check that a text of many characters, which is counted first, is refused only for its tokens."""
    generation = Generation(generation._source, Tokenizer(DEMO), ModelCard("demo", LEN, 1))
    text = " " * 160_000
    token_ids = asyncio.run(generation.tokenize(GenerationRequest(text), add_special_tokens=False))
    assert generation.tokenizer.decode(token_ids) == text
    assert len(token_ids) < 20_000


@pytest.mark.parametrize(
    "prompt",
    [
        Conversation((ChatMessage("user", "a" * INLINE_CHARS),)),
        Conversation((ChatMessage("user", "a"),) * 300),
        Conversation((ChatMessage("user", "a"), ChatMessage("assistant", "", reasoning="a" * INLINE_CHARS))),
        Conversation((ChatMessage("user", "a"),), template_kwargs={"x": [[]]}),
        Conversation((ChatMessage("user", "a", name="a" * INLINE_CHARS),)),
        Conversation((ChatMessage("assistant", "", tool_calls=(PastCall("1", "a" * INLINE_CHARS, "{}"),)),)),
        Conversation((ChatMessage("assistant", "", tool_calls=(PastCall("1", "f", "{}"),) * 300),)),
        Conversation((ChatMessage("user", "a"),), template_kwargs={"x": "a" * INLINE_CHARS}),
        Conversation((ChatMessage("user", "a"),), template_kwargs={f"x{n}": 1 for n in range(2000)}),
        Tool("f", "a" * INLINE_CHARS),
        Tool("f", parameters={"properties": {"x": {"enum": list(range(3000))}}}),
        Tool("f", parameters={"required": ["x" * 9] * 2000}),
        "a" * (INLINE_CHARS + 1),
        [1] * (INLINE_CHARS + 1),
    ],
)
def test_long_prompts_are_prepared_in_a_thread(source: EchoSource, tokenizer: Tokenizer, prompt: Any) -> None:
    async def test() -> None:
        threads, may_finish = BoundedThreadPool(num_threads=1), threading.Event()
        generation = Generation(source, tokenizer, ModelCard("echo", 10**6, 1), threads=threads)
        running = asyncio.create_task(threads.run(may_finish.wait, 60))
        request = GenerationRequest(CHAT, tool_use=ToolUse((prompt,))) if isinstance(prompt, Tool) else None
        long = asyncio.create_task(generation.prepare(request or GenerationRequest(prompt)))
        await generation.prepare(GenerationRequest("short"))
        assert not long.done()
        may_finish.set()
        assert len(await long) == 1
        await running

    asyncio.run(test())
