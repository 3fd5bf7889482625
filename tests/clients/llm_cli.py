"""These checks run the command line `llm`, which reads the model from its file extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checks import CITIES, KEY, MODEL, QUESTION, run_checks

NAME = "ours"
TOOL = """def get_weather(city: str) -> str:
    \"\"\"Tell the weather.\"\"\"
    return "20 degrees"
"""


@contextmanager
def configured(url: str) -> Iterator[dict[str, str]]:
    """Write llm's configuration to a folder during the block, and yield the environment for the command."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"api_base": f"{url}/v1", "supports_schema": True, "supports_tools": True}
        models = [
            {"model_id": NAME, "model_name": MODEL, **options},
            {"model_id": f"{NAME}-completion", "model_name": MODEL, "api_base": f"{url}/v1", "completion": True},
        ]
        # JSON is YAML, too.
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps(models))
        yield {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": KEY}


def llm(environment: dict[str, str], *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def prompt_and_next_turn(url: str) -> None:
    options = ("-o", "max_tokens", "20", "-o", "temperature", "0")
    with configured(url) as environment:
        streamed = llm(environment, "-m", NAME, QUESTION, *options)
        assert llm(environment, "-m", NAME, "--no-stream", QUESTION, *options) == streamed
        llm(environment, "-c", "And in Rome?", *options)


def schema(url: str) -> None:
    form = {"type": "object", "properties": {"city": {"enum": CITIES}}, "required": ["city"]}
    form["additionalProperties"] = False
    with configured(url) as environment:
        for stream in ((), ("--no-stream",)):
            answer = llm(environment, "-m", NAME, *stream, "--schema", json.dumps(form), QUESTION)
            assert json.loads(answer)["city"] in CITIES


def tools(url: str) -> None:
    with configured(url) as environment:
        llm(environment, "-m", NAME, "--functions", TOOL, QUESTION, "-o", "max_tokens", "20", "--td")


def completion(url: str) -> None:
    with configured(url) as environment:
        llm(environment, "-m", f"{NAME}-completion", QUESTION, "-o", "max_tokens", "5")


if __name__ == "__main__":
    run_checks(prompt_and_next_turn, schema, tools, completion)
