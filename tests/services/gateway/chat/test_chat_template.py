"""The tests check what a `ChatTemplate` finds out about a template, and the prompts that it renders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from services.gateway.chat.conversation import ChatMessage, Conversation, PastCall, PastCallForm
from services.gateway.chat.tokenizer import Tokenizer
from tests.services.gateway.chat_formats import FORMATS, write_model
from tests.services.gateway.echo import save_tokenizer
from tests.services.gateway.weather import NOW, WEATHER

USER = ChatMessage("user", "hi")
PAST_CALLS = (PastCall("1", "get_weather", '{"city": "é", "days": 3}'), PastCall("2", "now", "{}"))
CALLS = ChatMessage("assistant", "Look:", tool_calls=PAST_CALLS)
RESULTS = (ChatMessage("tool", "sunny", tool_call_id="1"), ChatMessage("tool", "noon", tool_call_id="2"))
PREAMBLES = {
    "deepseek-v3": (
        "## Tools\nYou can call these functions:\n\n### now\n",
        "If no function is needed, answer without calls.",
    ),
    "deepseek-v31": ("## Tools\nYou have access to the following tools:\n\n### now\n", "without separators or spaces"),
}

NAMES = {"deepseek-v3": "NAME_OF_FUNCTION", "deepseek-v31": "tool_call_name"}  # of functions in the preambles


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        name: Tokenizer(write_model(tmp_path_factory.mktemp(name), chat_format))
        for name, chat_format in FORMATS.items()
    }


@pytest.fixture
def rendered(tmp_path: Path) -> Callable[[str], Tokenizer]:
    """Return a function that makes a tokenizer with the template that it is given."""

    def make(template: str) -> Tokenizer:
        save_tokenizer(tmp_path, template)
        return Tokenizer(tmp_path)

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_template_of_a_format_reads(tokenizers: dict[str, Tokenizer], name: str) -> None:
    template, chat_format = tokenizers[name].template, FORMATS[name]
    assert template.tells_tools is chat_format.tells_tools
    assert template.switches == ((chat_format.switch,) if chat_format.switch else ())
    is_first = name == "deepseek-v3"
    assert template.past_calls == PastCallForm(name.startswith("deepseek"), is_null=is_first, is_apart=is_first)
    [note] = template.notes
    assert note.startswith(f"Chat format: {template.dialect.title}")
    assert ("the gateway offers tools" in note) is not chat_format.tells_tools


@pytest.mark.parametrize("name", FORMATS)
def test_earlier_calls_and_their_results_are_shown(tokenizers: dict[str, Tokenizer], name: str) -> None:
    prompt = tokenizers[name].render(Conversation((USER, CALLS, *RESULTS)))
    calls = FORMATS[name].write_calls([(call.name, call.arguments) for call in PAST_CALLS])
    _, _, after = prompt.partition("Look:")
    # The template of the first DeepSeek-V3 shows text and calls only in separate messages.
    end = FORMATS[name].eos if name == "deepseek-v3" else ""
    assert after.lstrip("\n").removeprefix(end).startswith(calls)
    assert after.index("sunny") < after.index("noon")


@pytest.mark.parametrize("name", FORMATS)
def test_earlier_calls_need_no_text_beside_them(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Check that a content of null and a content of "" are the same for all templates."""
    calls = FORMATS[name].write_calls([(call.name, call.arguments) for call in PAST_CALLS])
    prompts = [
        tokenizers[name].render(Conversation((USER, replace(CALLS, content=content), *RESULTS)))
        for content in (None, "")
    ]
    assert calls in prompts[0]
    assert "None" not in prompts[0]
    assert prompts[0] == prompts[1]


def test_a_template_that_shows_calls_only_beside_null(rendered: Callable[[str], Tokenizer]) -> None:
    """Check the conditions of DeepSeek's templates: V3 and R1 ask for a content of null, and V3-0324 for calls."""
    call = (
        "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + "
        "'\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>'"
    )
    calls = f"{{% for c in m.tool_calls or [] %}}{{{{ {call} }}}}{{% endfor %}}"
    first = f"{{% if m.content is none %}}{calls}{{% else %}}{{{{ m.content + '|' }}}}{{% endif %}}"
    later = f"{{% if m.content is none %}}{calls}{{% else %}}{{{{ m.content + '|' }}}}{calls}{{% endif %}}"
    for one, form in [(first, PastCallForm(True, is_null=True, is_apart=True)), (later, PastCallForm(True))]:
        tokenizer = rendered(f"{{% for m in messages %}}{one}{{% endfor %}}")
        assert tokenizer.template.past_calls == form
        prompt = tokenizer.render(Conversation((USER, CALLS, *RESULTS)))
        assert prompt.startswith("hi|Look:|<｜tool▁calls▁begin｜>")
        assert prompt.endswith("<｜tool▁call▁end｜>sunny|noon|")


@pytest.mark.parametrize(("name", "preamble"), PREAMBLES.items())
def test_tools_are_offered_in_the_system_turn(
    tokenizers: dict[str, Tokenizer], name: str, preamble: tuple[str, str]
) -> None:
    tokenizer, tools = tokenizers[name], (NOW.to_template(), WEATHER.to_template())
    system, begin, begun = ChatMessage("system", "Be brief."), "<｜begin▁of▁sentence｜>", "<｜User｜>hi<｜Assistant｜>"
    for messages, start in [((USER,), begin), ((system, USER), f"{begin}Be brief.\n\n")]:
        prompt = tokenizer.render(Conversation(messages, tools))
        told, _, rest = prompt.partition(begun)
        assert told.startswith(start + preamble[0])
        assert told.endswith(preamble[1])
        assert '### get_weather\nDescription: Tells the weather.\n\nParameters: {"type": "object", ' in told
        example = FORMATS[name].write_calls([("NAME", "ARGUMENTS")]).partition("ARGUMENTS")
        assert all(part in told.replace(NAMES[name], "NAME") for part in (example[0], "<｜tool▁call▁end｜>"))
        assert rest in ("", "</think>")
        assert tokenizer.render(Conversation(messages)) == f"{start.removesuffix(chr(10) * 2)}{begun}{rest}"


def test_each_template_has_its_own_switch_of_reasoning(
    tokenizers: dict[str, Tokenizer], rendered: Callable[[str], Tokenizer]
) -> None:
    for name, chat_format in FORMATS.items():
        for is_enabled in (True, False):
            chat = Conversation((USER,), template_kwargs={"enable_thinking": is_enabled})
            prompt = tokenizers[name].render(chat)
            is_open = tokenizers[name].dialect.ends_in_reasoning(chat, prompt)
            assert is_open is (is_enabled and bool(chat_format.switch)), name
    chat = Conversation((USER,), template_kwargs={"thinking": True})
    assert tokenizers["deepseek-v31"].render(chat).endswith("<｜Assistant｜><think>")
    both = rendered("{{ messages[0].content }}{{ thinking }},{{ enable_thinking }}")
    assert both.template.switches == ("enable_thinking", "thinking")
    assert both.render(Conversation((USER,), template_kwargs={"enable_thinking": True})) == "hiTrue,True"


def test_calls_that_the_template_does_not_show_are_refused(rendered: Callable[[str], Tokenizer]) -> None:
    # a template with the markers of XML, which shows only contents
    tokenizer = rendered("{# <function= <parameter= #}{% for m in messages %}{{ m.content }}{% endfor %}")
    reason = "because the model's chat template does not show earlier tool calls."
    assert tokenizer.template.past_calls is None
    assert tokenizer.template.notes[1:] == [
        "Warning: the chat template does not tell the model of tools.",
        "Warning: the chat template does not show earlier tool calls, so chats with such calls are refused.",
    ]
    for messages, what in [((USER, CALLS), "the call of 'get_weather'"), ((USER, RESULTS[0]), "the role 'tool'")]:
        with pytest.raises(ValueError, match=f"^messages may not hold {what}, {reason}"):
            tokenizer.render(Conversation(messages))
    assert tokenizer.render(Conversation((USER,))) == "hi"


def test_what_is_said_of_templates_without_a_known_format(rendered: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    [note] = rendered("{{ messages[0].content }}").template.notes
    assert note.startswith(
        "Warning: the chat template has no format for tool calls that the gateway knows, so chats are an"
    )
    save_tokenizer(tmp_path / "without", None)
    assert Tokenizer(tmp_path / "without").template.notes == [
        "Warning: the model has no chat template, so chats are refused."
    ]
