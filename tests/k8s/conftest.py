from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from tests.k8s.documentation import NEXT, make_next
from tests.k8s.manifests import OVERLAYS, Manifests, copy_with_secrets, need_kubectl, render


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of k8s/ with values in its Secrets, and with the overlay that docs/kubernetes.md describes."""
    need_kubectl()
    made = copy_with_secrets(tmp_path_factory.mktemp("k8s") / "k8s")
    make_next(made.parent)
    return made


@pytest.fixture(scope="session")
def rendered(tree: Path) -> Callable[[str], Manifests]:
    """Return a function that renders the overlay of a given name; every call returns a new copy of the manifests."""
    once: dict[str, Manifests] = {}

    def of(overlay: str) -> Manifests:
        if overlay not in once:
            once[overlay] = render(tree / "overlays" / overlay)
        return deepcopy(once[overlay])

    return of


@pytest.fixture(params=(*OVERLAYS, NEXT))
def manifests(request: pytest.FixtureRequest, rendered: Callable[[str], Manifests]) -> Manifests:
    """Return the manifests of an overlay; pytest runs the test once for every overlay."""
    return rendered(request.param)


@pytest.fixture
def everything(rendered: Callable[[str], Manifests]) -> Manifests:
    """Return the manifests of the overlay that has every kind of object, so that tests can plant faults in them."""
    return rendered("gpu-ha")
