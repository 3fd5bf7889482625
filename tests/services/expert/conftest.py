from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.family import ModelFamily, load_family
from services.expert.client import CallPolicy, RemoteExperts
from tests.services.expert.checkpoint import write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose time to the threads' waiting for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


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
