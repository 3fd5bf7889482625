"""A `ChatTemplate` renders the prompts of conversations with the chat template of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall, PastCallForm
from services.gateway.chat.dialects.dialect import Dialect, FindMarker
from services.gateway.chat.dialects.selection import dialect_of
from services.gateway.chat.thinking import SWITCHES
from services.gateway.chat.tools import Tool

# A template is a program: messages or arguments that it does not expect may raise any of these errors.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, LookupError, ArithmeticError, AttributeError)
# forms of earlier calls, in the order in which they are tried
FORMS = [PastCallForm(is_text, is_null, is_apart) for is_apart, is_null, is_text in product((False, True), repeat=3)]
# what the template is tried with
QUESTION = ChatMessage("user", "a question")
KEY, VALUE, CONTENT, RESULT = "a_key", "a value", "some content", "a result"
CALL = PastCall("call00000", "a_function", f'{{"{KEY}": "{VALUE}"}}')
TURN = ChatMessage("assistant", CONTENT, tool_calls=(CALL,))
RESULT_TURN = ChatMessage("tool", RESULT, tool_call_id=CALL.id)
TOOL = Tool(CALL.name, "a description", {"type": "object", "properties": {KEY: {"type": "string"}}})


class ChatTemplate:
    """A `ChatTemplate` renders conversations in the chat format of the model, which is its `dialect`.

    `hf` is the tokenizer of transformers that holds the template. What the template reads is found by rendering short
    conversations with it, because a template is a program whose text alone does not tell what it does:

    - `tells_tools`: True if the template tells the model of tools. If False, the dialect's preamble does.
    - `switches`: the names of the template's arguments that switch reasoning on and off.
    - `past_calls`: the form in which the template needs earlier calls; None: the template does not show earlier calls.
    """

    def __init__(self, hf: Any, find_marker: FindMarker) -> None:
        self._hf = hf
        self.dialect: Dialect = dialect_of(self.text, find_marker)
        self.tells_tools = CALL.name in self._tried([QUESTION], tools=[TOOL.to_template()])
        self.switches = tuple(name for name in SWITCHES if self._is_switch(name))
        self.past_calls = next((form for form in FORMS if self._shows_calls(form)), None)

    @property
    def text(self) -> str:
        """Return the text of the template; a model may have several templates, whose texts are joined."""
        template = self._hf.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    @property
    def notes(self) -> list[str]:
        """Return sentences about the chat format that whoever starts the server should know."""
        if not self.text:
            return ["Warning: the model has no chat template, so chats are refused."]
        if not self.dialect.has_calls:
            return [
                "Warning: the chat template has no format for tool calls that the gateway knows, so chats are answered "
                "without tools. Requests that force a call are refused."
            ]
        is_told, has_preamble = self.tells_tools, bool(self.dialect.preamble([]))
        how = "" if is_told or not has_preamble else "; the gateway offers tools, because the chat template does not"
        notes = [f"Chat format: {self.dialect.title}{how}."]
        if not (is_told or has_preamble):
            notes.append("Warning: the chat template does not tell the model of tools.")
        if self.past_calls is None:
            notes.append(
                "Warning: the chat template does not show earlier tool calls, so chats with such calls are refused."
            )
        return notes

    def render(self, chat: Conversation) -> str:
        """Return the text of the prompt that the chat template renders from a conversation.

        Raises ValueError if the conversation is invalid, if the model has no chat template, or if the template refuses
        the messages.
        """
        chat.check()
        if not self._hf.chat_template:
            raise ValueError("messages cannot be used because the model has no chat template; use /v1/completions.")
        chat = self._with_preamble(chat)
        if self.past_calls is None:
            self._check_no_calls(chat)
        try:
            ends = {
                "add_generation_prompt": chat.add_generation_prompt,
                "continue_final_message": chat.continued_field or False,
            }
            arguments = self._with_switches(chat.template_kwargs) | ends
            return self._apply(chat.messages, self.past_calls or FORMS[0], chat.tools, arguments)
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"messages do not fit the model's chat template: {str(error).rstrip('.')}.") from error
        except ValueError as error:
            if chat.continued_field is None:
                raise
            raise ValueError(
                "continue_final_message may not be true, because the model's chat template changes the end of the last "
                "message."
            ) from error

    def _with_preamble(self, chat: Conversation) -> Conversation:
        """Return `chat` with the dialect's text about tools in its system turn, if the template ignores tools."""
        preamble = self.dialect.preamble(chat.tools) if chat.tools and not self.tells_tools else ""
        if not preamble:
            return chat
        first, *others = chat.messages
        if first.role != "system":
            return replace(chat, messages=(ChatMessage("system", preamble), first, *others))
        return replace(chat, messages=(replace(first, content=f"{first.content}\n\n{preamble}"), *others))

    def _with_switches(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the template's arguments, in which each switch of the template has the value of `enable_thinking`."""
        if "enable_thinking" not in kwargs:
            return dict(kwargs)
        return {**dict.fromkeys(self.switches, kwargs["enable_thinking"]), **kwargs}

    def _check_no_calls(self, chat: Conversation) -> None:
        for message in chat.messages:
            what = f"the call of {message.tool_calls[0].name!r:.100}" if message.tool_calls else "the role 'tool'"
            if message.tool_calls or message.role == "tool":
                raise ValueError(
                    f"messages may not hold {what}, because the model's chat template does not show earlier tool calls."
                )

    def _apply(
        self,
        messages: Sequence[ChatMessage],
        form: PastCallForm,
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
    ) -> str:
        shown = [part for message in messages for part in message.to_template(form)]
        offered: Any = [dict(tool) for tool in tools] or None
        # The tokenizer's own `apply_chat_template` would remove a content that is null, which some templates need.
        rendered: Any = render_jinja_template(
            conversations=[shown],
            tools=offered,
            chat_template=self._hf.get_chat_template(None, tools=offered),
            **{**self._hf.special_tokens_map, **arguments},
        )
        [prompt], _ = rendered
        return str(prompt)

    def _tried(
        self,
        messages: Sequence[ChatMessage],
        form: PastCallForm = FORMS[0],
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt that the template renders, or "" if the template refuses the messages."""
        try:
            return self._apply(messages, form, tools, {"add_generation_prompt": True, **(arguments or {})})
        except (*TEMPLATE_ERRORS, ValueError):
            return ""

    def _is_switch(self, name: str) -> bool:
        prompts = [self._tried([QUESTION], arguments={name: value}) for value in (True, False)]
        return prompts[0] != prompts[1]

    def _shows_calls(self, form: PastCallForm) -> bool:
        """Return True if the template shows calls and their results in this form, with and without text beside them."""
        prompts = {
            text: self._tried([QUESTION, replace(TURN, content=text), RESULT_TURN], form) for text in (CONTENT, "")
        }
        return all(
            self.dialect.shows_call(prompt, CALL) and text in prompt and RESULT in prompt
            for text, prompt in prompts.items()
        )
