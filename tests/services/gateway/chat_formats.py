"""`FORMATS` holds a chat template and the markers of each chat format, and `write_model` makes a model of a format.

The templates in `chat_templates` are written in our own words, in the form of the public templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.demo import DEMO

TEMPLATES = Path(__file__).parent / "chat_templates"

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
XML_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
DEEPSEEK_SPECIAL = ("<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
DEEPSEEK_TOKENS = (
    *("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "outputs▁begin", "outputs▁end")),
    *(f"<｜tool▁{name}｜>" for name in ("call▁begin", "call▁end", "sep", "output▁begin", "output▁end")),
)


def _xml(calls: list[tuple[str, str]]) -> str:
    def one(name: str, arguments: str) -> str:
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in _object(arguments)}
        shown = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function={name}>\n{shown}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def _object(arguments: str) -> list[tuple[str, object]]:
    return list(json.loads(arguments).items())


def _tagged(calls: list[tuple[str, str]]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls
    )


def _fenced(calls: list[tuple[str, str]]) -> str:
    head = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    parts = [f"{head}{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>" for name, arguments in calls]
    lines = "\n".join(parts)
    return f"<｜tool▁calls▁begin｜>{lines}<｜tool▁calls▁end｜>"


def _unfenced(calls: list[tuple[str, str]]) -> str:
    parts = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>" for name, arguments in calls]
    return "".join(["<｜tool▁calls▁begin｜>", *parts, "<｜tool▁calls▁end｜>"])


@dataclass(frozen=True)
class ChatFormat:
    """A `ChatFormat` holds a chat template, the tokens that the template needs, and a writer of calls.

    `special` and `added` are the first tokens of the vocabulary. The `added` tokens are not special, as in the public
    tokenizers of Qwen and DeepSeek.
    """

    template: Path
    special: tuple[str, ...]
    added: tuple[str, ...]
    bos: str
    eos: str
    write_calls: Callable[[list[tuple[str, str]]], str]  # returns calls, given as names and arguments, as answers do
    switch: str = ""  # name of the template's argument that switches reasoning on; "" without reasoning
    tells_tools: bool = True

    @property
    def eos_id(self) -> int:
        return self.special.index(self.eos)


XML = (SPECIAL + XML_TOKENS, (), "<s>", "<|im_end|>", _xml)
QWEN = (SPECIAL, XML_TOKENS, "<s>", "<|im_end|>")
DEEPSEEK = (DEEPSEEK_SPECIAL, DEEPSEEK_TOKENS, *DEEPSEEK_SPECIAL[1:])
FORMATS: Mapping[str, ChatFormat] = {
    "nemotron": ChatFormat(DEMO / "chat_template.jinja", *XML, "enable_thinking"),
    "qwen3-coder": ChatFormat(TEMPLATES / "qwen3-coder.jinja", *QWEN, _xml),
    "qwen3-next": ChatFormat(TEMPLATES / "qwen3-next.jinja", *QWEN, _tagged),
    "deepseek-v3": ChatFormat(TEMPLATES / "deepseek-v3.jinja", *DEEPSEEK, _fenced, tells_tools=False),
    "deepseek-v31": ChatFormat(TEMPLATES / "deepseek-v31.jinja", *DEEPSEEK, _unfenced, "thinking", tells_tools=False),
}


def write_model(path: Path, chat_format: ChatFormat) -> Path:
    """Write the demo model to `path`, with the tokens and the template of `chat_format`, and return `path`."""
    path.mkdir(parents=True, exist_ok=True)
    write_format(path, chat_format)
    for name in ("config.json", "model.safetensors"):
        (path / name).symlink_to(DEMO / name)
    return path


def write_format(path: Path, chat_format: ChatFormat) -> None:
    """Write a tokenizer, the template of `chat_format` and `generation_config.json` to the directory of a model.

    The tokenizer is the demo's. The tokens of the format take the ids of the demo's special tokens. If the format has
    more tokens, the last tokens of the vocabulary are left out, so that the number of tokens stays the same.
    """
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    old = [token["content"] for token in tokenizer["added_tokens"]]
    tokens = [*chat_format.special, *chat_format.added]
    num_more, ordinary = len(tokens) - len(old), [token for token in vocab if token not in old]
    if num_more:
        ordinary, tokenizer["model"]["merges"] = ordinary[:-num_more], tokenizer["model"]["merges"][:-num_more]
    first = {token: n for n, token in enumerate(tokens[: len(old)])}
    last = {token: len(vocab) - num_more + n for n, token in enumerate(tokens[len(old) :])}
    tokenizer["model"]["vocab"] = first | {token: vocab[token] for token in ordinary}
    tokenizer["added_tokens"] = [
        tokenizer["added_tokens"][0] | {"id": n, "content": token, "special": token in chat_format.special}
        for token, n in (first | last).items()
    ]
    names = {"bos_token": chat_format.bos, "eos_token": chat_format.eos, "pad_token": chat_format.special[0]}
    config = json.loads((DEMO / "tokenizer_config.json").read_text()) | names
    generation = json.loads((DEMO / "generation_config.json").read_text()) | {"eos_token_id": chat_format.eos_id}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps(generation))
    (path / "chat_template.jinja").write_text(chat_format.template.read_text())
