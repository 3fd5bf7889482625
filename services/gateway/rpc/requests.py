"""`generation_request` and `tokenize_request` read the messages of inference.proto."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from services.engine.contract.sampling_params import MAX_STOP_TOKENS, Grammar, GrammarKind
from services.gateway.chat import grammars
from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall, check_message
from services.gateway.chat.thinking import Thinking
from services.gateway.chat.tools import Tool, ToolMode, ToolUse, parse_arguments
from services.gateway.errors import invalid
from services.gateway.generation_request import AnswerFormat, GenerationRequest, Prompt
from services.gateway.limits import GatewayLimits
from services.gateway.schema.json_size import check_text_size
from services.gateway.schema.json_text import loads

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_MODES = {
    pb.ToolChoice.MODE_UNSPECIFIED: None,
    pb.ToolChoice.MODE_AUTO: ToolMode.AUTO,
    pb.ToolChoice.MODE_NONE: ToolMode.NONE,
    pb.ToolChoice.MODE_REQUIRED: ToolMode.REQUIRED,
}


def generation_request(request: pb.GenerateRequest, limits: GatewayLimits) -> GenerationRequest:
    """Return the request that a message holds. Raises ValueError or ApiError if a field is invalid or too large."""
    # These numbers are checked first, because reading millions of numbers holds Python's global lock for long.
    num_ids, num_stops = len(request.token_ids.ids), len(request.sampling.stop_token_ids)
    num_biases = len(request.sampling.logit_bias)
    if num_ids > limits.json_items:
        raise invalid(f"prompt must hold at most {limits.json_items} token ids, not {num_ids}.", "prompt")
    if num_stops > MAX_STOP_TOKENS:
        raise invalid(f"stop_token_ids must be at most {MAX_STOP_TOKENS} ids, not {num_stops} ids.", "stop_token_ids")
    if num_biases > limits.logit_bias:
        raise invalid(f"logit_bias must hold at most {limits.logit_bias} tokens, not {num_biases}.", "logit_bias")
    sampling = _sampling(request.sampling)
    if request.echo and "logprobs" in sampling:
        sampling.setdefault("prompt_logprobs", sampling["logprobs"])
    return GenerationRequest(
        _prompt(request),
        sampling,
        sampling.pop("n", None),
        request.echo,
        _answer_format(request.response_format),
        _tool_use(request.chat),
        thinking=_thinking(request.chat),
        skip_special_tokens=_given(request, "skip_special_tokens", True),
        include_stop_str_in_output=request.include_stop_str_in_output,
        timeout=_given(request, "timeout"),
        truncate_prompt_tokens=_given(request, "truncate_prompt_tokens"),
    )


def _given(message: Message, name: str, default: Any = None) -> Any:
    """Return the field `name` of `message`, or `default` if the client did not set the field."""
    return getattr(message, name) if message.HasField(name) else default


def _prompt(request: pb.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return _conversation(request.chat)
    raise invalid("prompt is missing; one of text, token_ids and chat must be set.", "prompt")


def tokenize_request(request: pb.TokenizeRequest) -> GenerationRequest:
    match request.WhichOneof("prompt"):
        case "text":
            return GenerationRequest(request.text)
        case "chat":
            conversation = _conversation(request.chat)
            begins_turn = _given(request, "add_generation_prompt", conversation.add_generation_prompt)
            conversation = replace(conversation, add_generation_prompt=begins_turn)
            return GenerationRequest(conversation, tool_use=_tool_use(request.chat))
    raise invalid("prompt is missing; one of text and chat must be set.", "prompt")


def _conversation(chat: pb.Chat) -> Conversation:
    """Return the messages and template arguments of `chat` as a `Conversation`, to which the tools are added later."""
    kwargs = _template_kwargs(chat) if chat.HasField("template_kwargs") else None
    messages = tuple(_message(f"messages[{index}]", message) for index, message in enumerate(chat.messages))
    is_continued = chat.continue_final_message
    begins_turn = _given(chat, "add_generation_prompt", not is_continued)
    return Conversation(messages, (), _thinking(chat).template_kwargs(kwargs), begins_turn, is_continued)


def _template_kwargs(chat: pb.Chat) -> dict[str, Any]:
    try:
        return json_format.MessageToDict(chat.template_kwargs)
    except ValueError as error:
        raise ValueError("chat_template_kwargs must hold only finite numbers, not NaN or Infinity.") from error


def _thinking(chat: pb.Chat) -> Thinking:
    names = ("reasoning_effort", "thinking_token_budget", "enable_thinking")
    return Thinking(*(_given(chat, name) for name in names))


def _message(param: str, message: pb.ChatMessage) -> ChatMessage:
    if message.role not in ROLES:
        allowed = f"{', '.join(map(repr, ROLES[:-1]))} or {ROLES[-1]!r}"
        raise invalid(f"{param}.role must be {allowed}, not {message.role!r:.100}.", f"{param}.role")
    calls = tuple(
        PastCall(call.id, call.name, parse_arguments(call.arguments, f"{param}.tool_calls[{n}].function.arguments"))
        for n, call in enumerate(message.tool_calls)
    )
    fields = (message.name, message.reasoning_content, calls, message.tool_call_id)
    return check_message(ChatMessage(message.role, message.content, *fields), param)


def _tool_use(chat: pb.Chat) -> ToolUse:
    tools = tuple(_tool(index, tool) for index, tool in enumerate(chat.tools))
    is_named = chat.tool_choice.WhichOneof("choice") == "function"
    if chat.tool_choice.mode not in TOOL_MODES:
        highest = max(TOOL_MODES)
        raise ValueError(f"tool_choice must be a mode of 0 to {highest} or a function, not {chat.tool_choice.mode}.")
    mode, function = TOOL_MODES[chat.tool_choice.mode], chat.tool_choice.function if is_named else None
    return ToolUse.of(tools, mode, function, _given(chat, "parallel_tool_calls"), chat.tool_choice.allowed or None)


def _tool(index: int, tool: pb.Tool) -> Tool:
    param = f"tools[{index}].function.parameters"
    check_text_size(tool.parameters, param)
    try:
        schema = loads(tool.parameters or "{}")
    except ValueError:
        schema = None
    if not isinstance(schema, dict):
        raise ValueError(f"{param} must be a JSON schema of type 'object'.")
    return Tool(tool.name, tool.description, schema, tool.strict)


def _answer_format(response_format: pb.ResponseFormat) -> AnswerFormat | None:
    match response_format.WhichOneof("format"):
        case "json_object" if response_format.json_object:
            return AnswerFormat(Grammar(GrammarKind.JSON_OBJECT), "response_format")
        case "json_schema":
            return AnswerFormat(
                Grammar(GrammarKind.JSON_SCHEMA, response_format.json_schema), "response_format.json_schema.schema"
            )
        case "regex":
            return AnswerFormat(Grammar(GrammarKind.REGEX, response_format.regex), "structured_outputs.regex")
        case "grammar":
            return AnswerFormat(Grammar(GrammarKind.LARK, response_format.grammar), "structured_outputs.grammar")
        case "choice":
            return AnswerFormat(grammars.any_of(response_format.choice.texts), "structured_outputs.choice")
    return None


def _sampling(sampling: pb.SamplingParams) -> dict[str, Any]:
    """Return the sampling parameters that the client set, by their names in SamplingParams."""
    given: dict[str, Any] = {field.name: value for field, value in sampling.ListFields()}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given
