"""One API for the session, with operator and agents of two nodes; and one for a module, with nothing."""

from collections.abc import Iterator

import pytest

from tests.image_server import ImageServer, serving
from tests.operator.api import Api, running
from tests.operator.lab import Lab, a_lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with a_lab(tmp_path_factory.mktemp("operator"), ("one", "two")) as lab:
        yield lab


@pytest.fixture
def web() -> Iterator[ImageServer]:
    """A server with a disk of two MiB that is no text."""
    with serving(bytes(range(256)) * 8192) as server:
        yield server


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API of a module's own, without any of our kinds."""
    with running(tmp_path_factory.mktemp("api")) as api:
        yield api
