from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from tests.k8s.documentation import NEXT, make_next
from tests.k8s.manifests import OVERLAYS, Manifests, copy_with_secrets, need_kubectl, render


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of k8s/ as an operator has it who follows docs/kubernetes.md.

    In the copy, the Secrets have values, and the overlay `next` has been made.
    """
    need_kubectl()
    made = copy_with_secrets(tmp_path_factory.mktemp("k8s") / "k8s")
    make_next(made.parent)
    return made


@pytest.fixture(scope="session")
def rendered(tree: Path) -> Callable[[str], Manifests]:
    """Return a function that takes an overlay's name and returns a new copy of the overlay's manifests."""
    once: dict[str, Manifests] = {}

    def of(overlay: str) -> Manifests:
        if overlay not in once:
            once[overlay] = render(tree / "overlays" / overlay)
        return deepcopy(once[overlay])

    return of


@pytest.fixture(params=(*OVERLAYS, NEXT))
def manifests(request: pytest.FixtureRequest, rendered: Callable[[str], Manifests]) -> Manifests:
    """Return the manifests of one overlay. Pytest runs a test that uses this fixture once for every overlay."""
    return rendered(request.param)


@pytest.fixture
def everything(rendered: Callable[[str], Manifests]) -> Manifests:
    """Return the manifests of gpu-ha, the overlay with every kind of object. Tests plant faults in these manifests."""
    return rendered("gpu-ha")
