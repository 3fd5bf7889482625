"""These checks run guidellm on a local file of prompts, over chat completions, completions and responses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MODEL, QUESTION, run_checks

NUM_REQUESTS = 6


def benchmark(url: str, request_format: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "data.jsonl", Path(folder) / "report.json"
        data.write_text("\n".join(json.dumps({"prompt": QUESTION, "output_tokens_count": 8}) for _ in range(20)))
        options = {
            "--backend": f"kind=openai_http,target={url},model={MODEL},request_format={request_format}",
            "--profile": "kind=concurrent,streams=2",
            "--constraint": f"kind=max_requests,count={NUM_REQUESTS}",
            "--data": f"kind=json_file,path={data}",
            "--output": f"kind=json,path={report}",
        }
        command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console-interactive"]
        arguments = [text for pair in options.items() for text in pair]
        environment = {**os.environ, "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        assert done.returncode == 0, done.stderr[-500:]
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] >= NUM_REQUESTS, totals
    assert totals["errored"] == 0, totals


def chat_completions(url: str) -> None:
    benchmark(url, "/v1/chat/completions")


def completions(url: str) -> None:
    benchmark(url, "/v1/completions")


def responses(url: str) -> None:
    benchmark(url, "/v1/responses")


if __name__ == "__main__":
    run_checks(chat_completions, completions, responses)
