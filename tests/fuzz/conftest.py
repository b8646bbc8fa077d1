"""One service for all tests that it must survive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# pytest's importlib mode puts no folder of tests on the path; the helpers of these tests:
sys.path.append(str(Path(__file__).parents[1] / "process"))
sys.path.append(str(Path(__file__).parents[1] / "service"))
sys.path.append(str(Path(__file__).parent))

from attack import Target
from delivery import Replica
from publishers import Publisher


@pytest.fixture(scope="session")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return Publisher(tmp_path_factory.mktemp("keys") / "publisher")


@pytest.fixture(scope="session")
def make_target(
    tmp_path_factory: pytest.TempPathFactory, publisher: Publisher
) -> Iterator[Callable[..., Target]]:
    """Start a service of its own; it trusts the publisher."""
    replicas: list[Replica] = []

    def make(**options: object) -> Target:
        folder = tmp_path_factory.mktemp("target")
        replica = Replica(str(folder / "store"), folder / "log", (str(publisher.public_key),))
        replica.options |= options
        replicas.append(replica)
        return Target(replica.start(), publisher)

    yield make
    for replica in replicas:
        if replica.alive:
            replica.kill()


@pytest.fixture(scope="session")
def target(make_target: Callable[..., Target]) -> Target:
    """Shared by all tests that leave it as it was."""
    return make_target()
