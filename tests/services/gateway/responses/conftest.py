from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation, ModelCard
from services.gateway.limits import GatewayLimits
from tests.services.gateway.echo import EchoSource, plain_http

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "f",
    "description": "does it",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    "strict": False,
}
MAX_LEN = 256
LIMITS = GatewayLimits(body_bytes=100_000, input_items=200, stored_responses=3, stored_bytes=20_000)


@pytest.fixture
def generation(source: EchoSource, tokenizer: Tokenizer, compiler: GrammarCompiler) -> Generation:
    """Give the gateway a longer context and a smaller store than other tests need."""
    return Generation(source, tokenizer, ModelCard("echo", MAX_LEN, 1), compiler.check, limits=LIMITS)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """Replace the client of other tests with one that refuses responses of a wrong form."""
    with openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
        http_client=plain_http(),
    ) as client:
        yield client


def create(client: openai.OpenAI, **more: Any) -> Response:
    response: Response = client.responses.create(**{"model": "echo", "input": "hi", **more})
    return response
