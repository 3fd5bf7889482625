"""The test runs `expertmesh up --model` with a quantized checkpoint of a family that the demo does not belong to."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import jsonschema
import pytest

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from tests.model.steps import random_tokens
from tests.model.variants import write_variant
from tests.services.application import STOP_TIMEOUT_S, Application, inference
from tests.services.gateway.chat_formats import FORMATS, write_format
from tests.services.gateway.surfaces import Surfaces, comparable

pytestmark = pytest.mark.serial

NUM_SHARDS, NUM_TOKENS, VOCAB_SIZE = 3, 16, 2048
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["unit", "days"],
            "additionalProperties": False,
        },
    },
}
CALL = {
    "messages": [{"role": "user", "content": "def read(self):"}],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "max_tokens": 200,
    "temperature": 1.0,
    "seed": 4,
}


@pytest.mark.parametrize(("variant", "chat_format"), [("deepseek_fp8", "deepseek-v3")])
def test_a_checkpoint_is_served_through_shards(tmp_path: Path, variant: str, chat_format: str) -> None:
    """Ask for the tokens of transformers and for a forced call, over REST and gRPC, streamed and not streamed."""
    tiny, prompt = write_variant(tmp_path, variant, vocab_size=VOCAB_SIZE), random_tokens(20)
    write_format(tmp_path, FORMATS[chat_format])
    with Application(NUM_SHARDS, "--model", str(tmp_path)) as server:
        print(f"ready after {server.wait_until_ready():.1f} s")
        assert "no MTP weights" not in server.output
        with httpx.Client(base_url=server.url, timeout=60) as http, server.channel() as channel:
            surfaces = Surfaces(http, inference(channel))
            sampling = pb.SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
            answer = surfaces.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling))
            assert list(answer.choices[0].token_ids) == tiny.generate(prompt, NUM_TOKENS)

            results = {way: comparable(one, True, False) for way, one in surfaces.ask_all(CALL).items()}
            assert all(result == results["rest"] for result in results.values()), results
            [choice] = results["rest"].choices
            [(name, arguments)] = choice["calls"].values()
            assert (name, choice["finish"], choice["text"]) == ("weather", "tool_calls", "")
            jsonschema.validate(json.loads(arguments), TOOL["function"]["parameters"])

            status = server.status()
            assert len(status["shards"]) == NUM_SHARDS
            assert status["traffic"]["num_received"] > 0
        server.press_ctrl_c()
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert "Traceback" not in server.output
