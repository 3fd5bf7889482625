from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry, Counter

from services.engine.grammar.compiled_grammar import GrammarCompiler
from services.gateway.chat.tokenizer import Tokenizer
from services.gateway.generation import Generation, ModelCard
from services.gateway.health import Health
from services.gateway.limits import GatewayLimits
from services.gateway.rest import build_rest
from tests.services.gateway.echo import EOS, EchoSource, plain_http, save_tokenizer, serving

MAX_BODY_BYTES = 100_000
LIMITS = GatewayLimits(body_bytes=MAX_BODY_BYTES)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


@pytest.fixture(scope="session")
def compiler(model_dir: Path) -> GrammarCompiler:
    return GrammarCompiler(model_dir)


@pytest.fixture
def source(tokenizer: Tokenizer) -> EchoSource:
    return EchoSource(eos_id=tokenizer._hf.convert_tokens_to_ids(EOS))


@pytest.fixture
def max_model_len() -> int:
    """Return the context of the model in tokens; tests with long answers override this fixture."""
    return 64


@pytest.fixture
def generation(source: EchoSource, tokenizer: Tokenizer, compiler: GrammarCompiler, max_model_len: int) -> Generation:
    return Generation(source, tokenizer, ModelCard("echo", max_model_len, created=1), compiler.check, limits=LIMITS)


@pytest.fixture
def health() -> dict[str, Health]:
    return {"now": Health(is_ready=True)}


@pytest.fixture
def url(generation: Generation, health: dict[str, Health]) -> Iterator[str]:
    async def check() -> Health:
        return health["now"]

    async def more_metrics() -> CollectorRegistry:
        registry = CollectorRegistry()
        Counter("expertmesh:steps", "Steps.", registry=registry).inc(3)
        return registry

    with serving(build_rest(generation, check, more_metrics)) as address:
        yield address


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with plain_http(base_url=url) as client:
        yield client


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    http = plain_http()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        yield client
