"""These fixtures give the tests of expert shards a small model and a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.families.registry import load_family
from model.family import ModelFamily
from services.expert.client import CallPolicy, RemoteExperts
from tests.services.expert.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="session")
def family(model_dir: Path) -> ModelFamily:
    return load_family(model_dir)


@pytest.fixture
def remote() -> Iterator[RemoteExperts]:
    experts = RemoteExperts(CallPolicy(timeout_s=20.0))
    yield experts
    experts.close()
