"""These checks start litellm's proxy in front of the server and use it with litellm, with `openai` and over REST."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import openai
from checks import KEY, MODEL, QUESTION, run_checks
from litellm_questions import (
    check_chat_and_stream,
    check_context_error,
    check_structured_output,
    check_tools_sent_back,
)

START_TIMEOUT_S = 180


@contextmanager
def proxy(url: str, master_key: str) -> Iterator[str]:
    """Run the proxy on a free port during the block, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    params = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{url}/v1", "api_key": KEY}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"  # JSON is YAML, too
        models, settings = [{"model_name": MODEL, "litellm_params": params}], {"master_key": master_key}
        config.write_text(json.dumps({"model_list": models, "general_settings": settings}))
        command = [str(Path(sys.executable).with_name("litellm")), "--config", str(config), "--port", str(port)]
        with (Path(folder) / "log").open("w+") as log:
            environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1"], stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            try:
                _wait(f"http://127.0.0.1:{port}/health/liveliness", process, log.name)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()
                process.wait()


def _wait(address: str, process: subprocess.Popen[bytes], log: str) -> None:
    stop_at = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < stop_at and process.poll() is None:
        try:
            urlopen(address, timeout=5)
        except (URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the proxy did not start: {Path(log).read_text()[-2000:]}")


def through_proxy(url: str) -> None:
    master_key = f"sk-{secrets.token_hex(32)}"  # the proxy does not start with a weak key
    with proxy(url, master_key) as address:
        for provider in ("litellm_proxy", "openai"):
            model: dict[str, Any] = {"model": f"{provider}/{MODEL}", "api_base": address, "api_key": master_key}
            check_chat_and_stream(model)
            check_tools_sent_back(model)
            check_structured_output(model)
            check_context_error(model)
        client = openai.OpenAI(base_url=address, api_key=master_key, max_retries=0)
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], max_tokens=5, logprobs=True, top_logprobs=1
        )
        assert answer.choices[0].logprobs is not None
        assert [model.id for model in client.models.list()] == [MODEL]


if __name__ == "__main__":
    run_checks(through_proxy)
