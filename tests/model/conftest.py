from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from model import kernels
from model.families.checkpoint_family import BackboneModule
from model.families.registry import load_family
from model.family import ModelFamily
from tests.model.checkpoints import WITH_MTP, Tiny
from tests.model.variants import VARIANTS


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Run the tests on one thread, because a tiny product takes less time than waiting for a second thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def model_of(tiny_of: Callable[[str], Tiny]) -> Callable[..., BackboneModule]:
    """Return a function that loads the tiny checkpoint of a variant in fp32, with local experts.

    The function's second argument is True for plain PyTorch, and False for the CPU kernels.
    """
    return cache(lambda name, is_plain=False: load_fp32(load_family(tiny_of(name).path), is_plain))


def load_fp32(family: ModelFamily, is_plain: bool = False) -> BackboneModule:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "has_compiled", lambda: not is_plain)
        return family.load_backbone(family.load_local_experts(torch.float32), torch.float32)


@pytest.fixture(params=VARIANTS)
def tiny(request: pytest.FixtureRequest, tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of(request.param)


@pytest.fixture(params=["compiled", "plain"])
def model(request: pytest.FixtureRequest, tiny: Tiny, model_of: Callable[..., BackboneModule]) -> BackboneModule:
    return model_of(tiny.name, request.param == "plain")


@pytest.fixture
def latent(tiny_of: Callable[[str], Tiny]) -> Tiny:
    """Return the tiny checkpoint that has an MTP module and consists of one file."""
    return tiny_of(WITH_MTP)


@pytest.fixture
def latent_model(model_of: Callable[[str], BackboneModule]) -> BackboneModule:
    return model_of(WITH_MTP)
