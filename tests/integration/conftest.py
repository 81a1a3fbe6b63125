"""What several of the integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.forked_workers import forked_workers


@pytest.fixture(scope="session", autouse=True)
def workers() -> Iterator[None]:
    """The tests' clusters fork their workers: starting them took most of the tests' time."""
    with forked_workers():
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all runs of a module, which join the connection that they find."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
