from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionMessage,
    ParsedChatCompletionMessage,
)
from openai.types.chat import (
    completion_create_params as chat_params,
)

from services.engine.contract.sampling_params import SamplingParams
from services.gateway.chat.conversation import PastCallForm
from services.gateway.chat.tools import ToolMode
from services.gateway.errors import ApiError
from services.gateway.openai.body import Body, ChatBody, CompletionBody
from services.gateway.request_body import parse_body

USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "function": {"name": "g"}}
STARTS: dict[type[Body], dict[str, Any]] = {
    ChatBody: {"messages": [USER]},
    CompletionBody: {"prompt": "hi"},
}
# a value of each field of OpenAI's reference; the sentence is the refusal of a value that is not supported
OPENAI_CHAT: dict[str, tuple[Any, str]] = {
    "audio": ({"format": "wav", "voice": "alloy"}, "audio must be null, because nothing else is supported yet"),
    "function_call": ("auto", "function_call may only be given together with functions."),
    "functions": ([FUNCTION], ""),
    "max_completion_tokens": (5, ""),
    "metadata": ({"a": "b"}, ""),
    "modalities": (["text"], ""),
    "moderation": ({"model": "m"}, "moderation must be null, because nothing else is supported yet"),
    "parallel_tool_calls": (True, ""),
    "prediction": ({"type": "content", "content": "a"}, ""),
    "prompt_cache_key": ("a", ""),
    "prompt_cache_options": ({"mode": "explicit"}, ""),
    "prompt_cache_retention": ("24h", ""),
    "reasoning_effort": ("low", ""),
    "response_format": ({"type": "json_object"}, ""),
    "safety_identifier": ("a", ""),
    "service_tier": ("flex", ""),
    "store": (True, ""),
    "tool_choice": ("auto", ""),
    "tools": ([TOOL], ""),
    "top_logprobs": (0, ""),
    "verbosity": ("low", ""),
    "web_search_options": ({}, "web_search_options must be null, because nothing else is supported yet"),
}
OPENAI_BOTH: dict[str, tuple[Any, str]] = {
    "frequency_penalty": (0.5, ""),
    "logit_bias": ({"5": 1}, ""),
    "max_tokens": (5, ""),
    "model": ("m", ""),
    "n": (2, ""),
    "presence_penalty": (0.5, ""),
    "seed": (1, ""),
    "stop": (["a"], ""),
    "stream": (False, ""),
    "stream_options": ({"include_usage": True}, "stream_options may only be given together with stream=true."),
    "temperature": (0.5, ""),
    "top_p": (0.5, ""),
    "user": ("me", ""),
}
OPENAI: dict[type[Body], dict[str, tuple[Any, str]]] = {
    ChatBody: {**OPENAI_BOTH, **OPENAI_CHAT, "logprobs": (True, ""), "messages": ([USER], "")},
    CompletionBody: {
        **OPENAI_BOTH,
        "best_of": (1, ""),
        "echo": (True, ""),
        "logprobs": (2, ""),
        "prompt": ("a", ""),
        "suffix": ("b", 'suffix must be "" or null, because nothing else is supported yet, not'),
    },
}
# vLLM's own fields with their defaults (vllm/entrypoints/openai/completion/protocol.py and chat_completion/protocol.py)
VLLM_BOTH: dict[str, Any] = {
    "add_special_tokens": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "cache_salt": None,
    "ec_transfer_params": None,
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "kv_transfer_params": None,
    "length_penalty": 1.0,
    "logprob_token_ids": None,
    "min_p": None,
    "min_tokens": 0,
    "priority": 0,
    "prompt_logprobs": None,
    "repetition_detection": None,
    "repetition_penalty": None,
    "request_id": "abc",
    "response_format": None,
    "return_mm_kwargs": True,
    "return_token_ids": None,
    "return_token_offsets": False,
    "return_tokens_as_token_ids": None,
    "routed_experts_prompt_start": 0,
    "session_id": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop": [],
    "stop_token_ids": [],
    "stream_interval": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
    "top_k": None,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "use_beam_search": False,
    "vllm_xargs": None,
    "watermarking": None,
}
VLLM: dict[type[Body], dict[str, Any]] = {
    ChatBody: {
        **VLLM_BOTH,
        "add_special_tokens": False,
        "add_generation_prompt": True,
        "chat_template": None,
        "chat_template_kwargs": None,
        "continue_final_message": False,
        "documents": None,
        "echo": False,
        "include_reasoning": True,
        "logprobs": False,
        "media_io_kwargs": None,
        "mm_processor_kwargs": None,
        "n": 1,
        "parallel_tool_calls": True,
        "return_prompt_text": None,
        "stream": False,
        "tool_choice": "none",
        "top_logprobs": 0,
    },
    CompletionBody: {**VLLM_BOTH, "add_special_tokens": True, "echo": False, "prompt_embeds": None, "max_tokens": 16},
}


def parse(kind: type[Body], **more: Any) -> Body:
    return parse_body(kind, json.dumps({**STARTS[kind], **more}).encode())


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ChatBody, chat_params.CompletionCreateParamsNonStreaming),
        (CompletionBody, completion_create_params.CompletionCreateParamsNonStreaming),
    ],
)
def test_every_field_of_openai_is_known(kind: type[Body], params: Any) -> None:
    assert set(OPENAI[kind]) == set(get_type_hints(params))
    for name, (value, refusal) in OPENAI[kind].items():
        more = {"logprobs": True} if name == "top_logprobs" else {"tools": [TOOL]} if "tool_" in name else {}
        if not refusal:
            parse(kind, **more, **{name: value}).request()
        else:
            with pytest.raises(ApiError) as refused:
                parse(kind, **{name: value})
            assert refused.value.message.startswith(refusal), refused.value.message
        if name not in STARTS[kind]:
            assert parse(kind, **{name: None}) == parse(kind)


@pytest.mark.parametrize("kind", VLLM)
def test_every_field_of_vllm_is_accepted_at_its_default(kind: type[Body]) -> None:
    body = parse(kind, **VLLM[kind])
    request = body.request()
    assert request.params({}) == SamplingParams(**({"max_tokens": 16} if kind is CompletionBody else {}))
    assert request.skip_special_tokens
    assert not request.echo
    for name in VLLM[kind]:
        assert parse(kind, **{name: None}) == parse(kind), name


def test_fields_that_would_change_the_answer_are_refused() -> None:
    for more in (
        {"use_beam_search": True}, {"allowed_token_ids": [1]}, {"bad_words": ["x"]}, {"length_penalty": 2},
        {"logprob_token_ids": [1]}, {"return_tokens_as_token_ids": True}, {"truncation_side": "right"},
        {"vllm_xargs": {"a": 1}}, {"watermarking": True}, {"modalities": ["audio"]}, {"documents": [{"text": "a"}]},
        {"chat_template": "x"}, {"echo": True}, {"add_special_tokens": True}, {"mm_processor_kwargs": {"a": 1}},
    ):  # fmt: skip
        (name,) = more
        with pytest.raises(
            ApiError, match=f"^{name} must be .*, because nothing else is supported yet, not .*"
        ) as refused:
            parse(ChatBody, **more)
        assert refused.value.param == name


def test_parameters_reach_the_request() -> None:
    request = parse(
        ChatBody, truncate_prompt_tokens=-1, skip_special_tokens=False, include_stop_str_in_output=True, cache_salt="s",
        continue_final_message=True, max_tokens=-1, top_k=5.0, seed=3.0, n=2.0, thinking_token_budget=7,
    ).request()  # fmt: skip
    assert (request.truncate_prompt_tokens, request.skip_special_tokens, request.n) == (-1, False, 2)
    assert request.include_stop_str_in_output
    assert (request.params({}).cache_salt, request.params({}).top_k, request.params({}).seed) == ("s", 5, 3)
    assert request.params({}).max_tokens is None
    assert request.thinking.token_budget == 7
    assert request.prompt.continue_final_message  # type: ignore[union-attr]
    assert not request.prompt.add_generation_prompt  # type: ignore[union-attr]
    assert parse(CompletionBody, max_tokens=-1).request().is_unlimited


def messages_of(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages in the form in which the chat template gets them."""
    conversation = parse(ChatBody, messages=list(messages)).request().prompt
    messages = conversation.messages  # type: ignore[union-attr]
    return [shown for message in messages for shown in message.to_template(PastCallForm())]


def test_messages_of_the_official_sdk_come_back_unchanged() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    plain = ChatCompletionMessage.model_validate({"role": "assistant", "content": "x", "reasoning_content": "because"})
    parsed = ParsedChatCompletionMessage[Any].model_validate(
        {"role": "assistant", "content": None, "tool_calls": [call], "parsed": {"a": 1}}
    )
    for dumped in (plain.model_dump(), plain.model_dump(mode="json")):
        assert dumped["audio"] is None
        assert messages_of(dumped) == [{"role": "assistant", "content": "x", "reasoning_content": "because"}]
    dumped = parsed.model_dump()
    assert "parsed_arguments" in dumped["tool_calls"][0]["function"]
    (template,) = messages_of(dumped)
    assert template["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"a": 1}}}]


def test_fields_of_other_servers_have_no_effect() -> None:
    message = {
        "role": "assistant",
        "content": "x",
        "reasoning": "because",
        "annotations": [{"type": "url_citation"}],
        "id": "m",
        "refusal": None,
        "function_call": None,
        "audio": None,
        "parsed": {"a": 1},
        "provider": "p",
        "reasoning_details": [{"type": "reasoning.text", "text": "because"}],
        "cache_control": {"type": "ephemeral"},
        "thinking_blocks": [{"type": "thinking", "thinking": "because", "signature": "s"}],
        "tool_calls": None,
    }
    assert messages_of(message) == [{"role": "assistant", "content": "x", "reasoning_content": "because"}]
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {}}
    assert messages_of({"role": "user", "content": [part, "y"], "tool_calls": []}) == [
        {"role": "user", "content": "xy"}
    ]


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({"reasoning": "a"}, "a"),
        ({"reasoning_content": "a"}, "a"),
        ({"reasoning": "a", "reasoning_content": "b"}, "b"),
        ({"reasoning": "a", "reasoning_content": None}, "a"),
        ({"content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "x"}]}, "a"),
    ],
)
def test_reasoning_of_past_messages(fields: dict[str, Any], reasoning: str) -> None:
    (message,) = messages_of({"role": "assistant", "content": "x", **fields})
    assert message == {"role": "assistant", "content": "x", "reasoning_content": reasoning}


def test_content_of_past_messages() -> None:
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert messages_of(refusal)[0]["content"] == "no"
    assert messages_of({"role": "assistant", "content": None, "refusal": "no"})[0]["content"] == "no"
    assert messages_of({"role": "assistant", "content": None})[0]["content"] == ""
    assert messages_of({"role": "tool", "content": None, "tool_call_id": "a"})[0]["content"] == ""
    for type_ in ("image_url", "input_audio", "file"):
        with pytest.raises(
            ApiError, match=f"because the model reads only text, but part 0 is of type '{type_}'"
        ) as bad:
            messages_of({"role": "user", "content": [{"type": type_, type_: {}}]})
        assert bad.value.param == "messages[0].content"


def test_arguments_of_past_calls() -> None:
    def arguments(value: Any) -> Any:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": value}}
        (message,) = messages_of({"role": "assistant", "tool_calls": [call]})
        return message["tool_calls"][0]["function"]["arguments"]

    assert arguments('{"city": "Par') == {"city": "Par"}  # an answer that ended with finish_reason "length"
    assert arguments("") == arguments(None) == arguments("{") == {}
    assert arguments({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="must be a JSON object as a string, not 'Paris'"):
        arguments("Paris")


@pytest.mark.parametrize(
    ("choice", "mode", "function", "allowed"),
    [
        ("required", ToolMode.REQUIRED, None, None),
        ({"type": "function", "function": {"name": "f"}}, ToolMode.AUTO, "f", None),
        ({"type": "function", "name": "f"}, ToolMode.AUTO, "f", None),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}},
            *(ToolMode.REQUIRED, None, ("g",)),
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            *(ToolMode.AUTO, None, ("f",)),
        ),
    ],
)
def test_tool_choice(choice: Any, mode: ToolMode, function: str | None, allowed: tuple[str, ...] | None) -> None:
    use = parse(ChatBody, tools=[TOOL, OTHER], tool_choice=choice).request().tool_use
    assert (use.mode, use.function, use.allowed) == (mode, function, allowed)


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function"},
        {"type": "function", "name": "f", "function": {"name": "f"}},
        {"type": "function", "name": "f", "mode": "auto"},
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "mode": "auto"},
        {"type": "allowed_tools", "name": "f", "mode": "auto", "tools": []},
        {"type": "custom", "custom": {"name": "f"}},
    ],
)
def test_a_bad_tool_choice(choice: Any) -> None:
    with pytest.raises(ApiError, match=r"^tool_choice.* m(ust|ay) .*\.$") as refused:
        parse(ChatBody, tools=[TOOL], tool_choice=choice)
    assert str(refused.value.param).startswith("tool_choice")


def test_functions_of_the_older_api() -> None:
    body = parse(ChatBody, functions=[FUNCTION], function_call={"name": "f"})
    assert isinstance(body, ChatBody)
    use = body.request().tool_use
    assert ([tool.name for tool in use.tools], use.function, use.max_calls) == (["f"], "f", 1)
    assert body.calls_functions
    call, answer = messages_of(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": "b"}'}},
        {"role": "function", "name": "f", "content": "done"},
    )
    assert call["tool_calls"] == [{"id": "f", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}]
    assert answer == {"role": "tool", "content": "done", "name": "f", "tool_call_id": "f"}
    for more in ({"tools": [TOOL]}, {"tool_choice": "auto"}):
        with pytest.raises(ApiError, match=r"may not be given together with"):
            parse(ChatBody, functions=[FUNCTION], **more)
    # "none" is the default of function_call without functions, and says nothing about tools.
    assert parse(ChatBody, function_call="none").request() == parse(ChatBody).request()
    assert parse(ChatBody, tools=[TOOL], function_call="none").request() == parse(ChatBody, tools=[TOOL]).request()


def test_hints_of_a_tool_have_no_effect() -> None:
    hints: dict[str, Any] = {"cache_control": {"type": "ephemeral"}, "defer_loading": True}
    tool = {**TOOL, **hints, "function": {**FUNCTION, "defer_loading": False}}
    assert parse(ChatBody, tools=[tool]).request() == parse(ChatBody, tools=[TOOL]).request()
    with pytest.raises(ApiError, match=r"Unknown field 'tools\[0\].function.paramters'; the nearest allowed field is"):
        parse(ChatBody, tools=[{"type": "function", "function": {"name": "f", "paramters": {}}}])


def test_json_object_with_a_schema() -> None:
    form = (
        parse(ChatBody, response_format={"type": "json_object", "schema": {"type": "object"}}).request().answer_format
    )
    assert form is not None
    assert (form.grammar.text, form.param) == ('{"type": "object"}', "response_format.schema")
    with pytest.raises(ApiError, match="may hold a schema only if its type is 'json_object'"):
        parse(ChatBody, response_format={"type": "text", "schema": {}})
