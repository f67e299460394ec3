"""One Prefect server with a database of its own for all tests of a worker, and a migrated MLflow database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from tests.tracking.conftest import migrated, project

__all__ = ["migrated", "prefect_api", "project"]


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """Address of the server, also for children."""
    with prefect_test_harness(server_startup_timeout=180):
        yield PREFECT_API_URL.value()
